// A stand-in for libcuda.so.1 whose device memory is host memory and whose kernels are the emulated ones: what
// cuda.bindings hands to cuLaunchKernel is unpacked here as the real driver would.
#include "emulator.h"

#include <string.h>

#include "cuda.cu"

typedef int Result;  // CUresult: 0 success, 1 invalid value, 200 invalid image, 500 not found

template <class T>
static T argument(void** arguments, int k) {
  return *(T*)arguments[k];
}

extern "C" {
Result cuModuleLoadData(void** module, const void* image) {
  if (memcmp(image, "\x7f" "ELF", 4)) return 200;  // a cubin is an ELF file
  *module = (void*)image;
  return 0;
}

Result cuModuleGetFunction(void** function, void*, const char* name) {
  const char* known[] = {"balanced_adam_flat", "balanced_adam_multi", "balanced_adam_prepare", "balanced_adam_squares"};
  for (long k = 0; k < 4; k++)
    if (!strcmp(name, known[k])) {
      *function = (void*)(k + 1);
      return 0;
    }
  return 500;
}

Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared, void* stream, void** a, void** extra) {
  if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared || extra || stream != (void*)7) return 1;
  long k = (long)function;
  if (k == 1) launch(grid_x, block_x, balanced_adam_flat, argument<Row>(a, 0), argument<i64>(a, 1));
  if (k == 2)
    launch(grid_x, block_x, balanced_adam_multi, argument<const Row*>(a, 0), argument<i64>(a, 1), argument<i64>(a, 2));
  if (k == 3)
    launch(grid_x, block_x, balanced_adam_prepare, argument<const Recipe*>(a, 0), argument<Row*>(a, 1), argument<i64>(a, 2));
  if (k == 4)
    launch(grid_x, block_x, balanced_adam_squares, argument<const Row*>(a, 0), argument<i64>(a, 1), argument<i64>(a, 2),
           argument<double*>(a, 3));
  return 0;
}

Result cuMemcpyHtoDAsync_v2(void* device, const void* host, size_t bytes, void* stream) {
  if (stream != (void*)7) return 1;
  memcpy(device, host, bytes);
  return 0;
}

Result cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status);

static void* address(const char* name) {
  if (!strcmp(name, "cuModuleLoadData")) return (void*)cuModuleLoadData;
  if (!strcmp(name, "cuModuleGetFunction")) return (void*)cuModuleGetFunction;
  if (!strcmp(name, "cuLaunchKernel")) return (void*)cuLaunchKernel;
  if (!strcmp(name, "cuMemcpyHtoDAsync")) return (void*)cuMemcpyHtoDAsync_v2;
  if (!strcmp(name, "cuGetProcAddress")) return (void*)cuGetProcAddress_v2;
  return nullptr;
}

Result cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
  *function = address(name);
  if (status) *status = *function ? 0 : 1;
  return *function ? 0 : 500;
}
}
