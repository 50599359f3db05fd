// Just enough of CUDA to run balanced_adam/kernels/cuda.cu on the CPU, as it is: it has no shared memory and no barriers,
// so that the threads of a grid may run one after the other.
#pragma once
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Dimension {
  unsigned x;
};
static thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;

template <class Kernel, class... Arguments>
static void launch(unsigned blocks, unsigned threads, Kernel kernel, Arguments... arguments) {
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) kernel(arguments...);
}
