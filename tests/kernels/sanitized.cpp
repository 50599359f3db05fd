// Runs the kernels on arrays of exactly the size they are told, under the address and undefined-behaviour sanitizers.
#include <stdio.h>
#include <stdlib.h>

#include "rule.h"

// One state alone: the compiler takes long under the sanitizers.
namespace balanced_adam {
constexpr int STORED = SANITIZED_STATE::TWO                  ? 0
                       : sizeof(SANITIZED_STATE::Word) == 4 ? 1
                       : sizeof(SANITIZED_STATE::Word) == 2 ? 2
                                                            : 3;
}
#define STATES(DO) DO(STORED, SANITIZED_STATE)
#include "cpu.cpp"

// Macros of cuda.cu's, and names of template parameters in cpu.cpp: so they come after it.
#define PARAM SANITIZED_PARAM
#define GRAD SANITIZED_GRAD
#define COPY SANITIZED_COPY
#define STATE SANITIZED_STATE
#include "emulator.h"

#include "cuda.cu"

template <class T>
struct Array {
  T* memory;
  T* start;
  Array(i64 size, int shift) : memory((T*)malloc((size + shift) * sizeof(T))), start(memory + shift) {
    for (i64 i = 0; i < size + shift; i++) memory[i] = (T)(i % 7);
  }
  ~Array() { free(memory); }
};

static void run(i64 size, int shift, int disagree) {
  Array<Param::Stored> param(size, shift);
  Array<Grad::Stored> grad(size, shift);
  Array<balanced_adam::Copy::Stored> copy(size, shift);
  Array<State::Word> first(size, shift + disagree), second(State::TWO ? size : 0, shift);
  float factor = 0.5f;
  Row row = {param.start, grad.start, COPY ? copy.start : nullptr, first.start, second.start, &factor, size, 0,
             {0.9f, 0.1f, 0.9f, 0.1f, 1e-8f, 1e-3f, 0.99f, 1.0f, 0.0f}};
  const i64 chunk = 64;
  i64 chunks = (size + chunk - 1) / chunk;
  launch(chunks, THREADS, balanced_adam_flat, row, chunk);
  Row two[2] = {row, row};
  two[1].first_chunk = chunks;
  launch(2 * chunks, THREADS, balanced_adam_multi, (const Row*)two, (i64)2, chunk);
  double* sums = (double*)malloc(sizeof(double) * 2 * chunks * THREADS);
  launch(2 * chunks, THREADS, balanced_adam_squares, (const Row*)two, (i64)2, chunk, sums);
  free(sums);
  for (int isa = 0; isa <= balanced_adam_cpu_best_isa(); isa++) {
    double squares[2], greatest[2];
    balanced_adam_cpu_step(&row, 1, PARAM, GRAD, COPY, 0, STORED, isa, 1);
    balanced_adam_cpu_measure(two, 2, GRAD, STORED, squares, greatest, isa, 1);
    balanced_adam_cpu_measure(two, 2, NONE, STORED, squares, greatest, isa, 1);
  }
}

int main() {
  for (i64 size = 1; size < 300; size += size < 20 ? 1 : 37)
    for (int shift = 0; shift < 4; shift++)
      for (int disagree = 0; disagree < 2; disagree++) run(size, shift, disagree);
  puts("clean");
}
