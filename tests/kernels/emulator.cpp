// The CUDA kernels of one variant as C functions, for tests/kernels/build.py.
#include "emulator.h"

#include "cuda.cu"

extern "C" {
void emulate_flat(const Row* row, i64 chunk_size) {
  launch((unsigned)((row->size + chunk_size - 1) / chunk_size), THREADS, balanced_adam_flat, *row, chunk_size);
}

void emulate_multi(const Row* rows, i64 count, i64 chunk_size, unsigned blocks) {
  launch(blocks, THREADS, balanced_adam_multi, rows, count, chunk_size);
}

void emulate_squares(const Row* rows, i64 count, i64 chunk_size, unsigned blocks, double* sums) {
  launch(blocks, THREADS, balanced_adam_squares, rows, count, chunk_size, sums);
}
}
