// The CUDA kernels around rule.h. NVRTC compiles them at run time (kernels/cuda.py) for one device and one combination of
//   PARAM, GRAD, COPY: dtypes as in rule.h (COPY may be NONE),
//   STATE: Float32State or one of rule.h's packed states.
// THREADS is the size of a block. Chunks and rows are counted in 32 bits, elements in 64.
// No includes but rule.h, and no shared memory: tests run this very file on the CPU.
#include "rule.h"

// Of a pointer read from memory: without this every access through it would be a generic one.
#ifdef __CUDA_ARCH__
#define ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#else
#define ASSUME_GLOBAL(pointer) (void)(pointer)
#endif

namespace balanced_adam {

// Four elements at a time: 16 bytes of fp32, 8 bytes of 16-bit data, so that one head count can align every array.
constexpr int WIDTH = 4;

template <class T>
struct alignas(sizeof(T) * WIDTH) Vector {
  T x[WIDTH];
};

typedef Element<PARAM> Param;
typedef Element<GRAD> Grad;
typedef Element<COPY == NONE ? FLOAT32 : COPY> Copy;
typedef STATE State;

// A row's arrays with their types, and the scalars in registers.
struct Arrays {
  Param::Stored* param;
  const Grad::Stored* grad;
  Copy::Stored* copy;
  State::Word* first;
  State::Word* second;
  float factor;  // -1 times it to maximize
  Scalars scalars;
};

// From element `begin` on.
__device__ __forceinline__ Arrays arrays_of(const Row& row, i64 begin) {
  Arrays a;
  a.param = (Param::Stored*)row.param + begin;
  a.grad = (const Grad::Stored*)row.grad + begin;
  a.copy = (Copy::Stored*)row.copy + begin;
  a.first = (State::Word*)row.first + begin;
  a.second = (State::Word*)row.second + begin;
  a.scalars = row.scalars;
  a.factor = row.factor ? *row.factor * row.scalars.sign : row.scalars.sign;
  ASSUME_GLOBAL(a.param);
  ASSUME_GLOBAL(a.grad);
  ASSUME_GLOBAL(a.first);
  if (State::TWO) ASSUME_GLOBAL(a.second);
  if (COPY != NONE) ASSUME_GLOBAL(a.copy);
  return a;
}

__device__ __forceinline__ void step_one(const Arrays& a, int i) {
  float p = Param::load(a.param[i]), g = Grad::load(a.grad[i]) * a.factor;
  State::Code first = a.first[i], second = State::TWO ? a.second[i] : first;
  step<State>(a.scalars, p, g, first, second);
  a.first[i] = (State::Word)first;
  if (State::TWO) a.second[i] = (State::Word)second;
  a.param[i] = Param::store(p);
  if (COPY != NONE) a.copy[i] = Copy::store(p);
}

template <class T>
__device__ __forceinline__ Vector<T>& four(T* array, i64 i) {
  return *(Vector<T>*)(array + i);
}

template <class T>
__device__ __forceinline__ const Vector<T>& four(const T* array, i64 i) {
  return *(const Vector<T>*)(array + i);
}

__device__ __forceinline__ void step_four(const Arrays& a, int i) {
  Vector<Param::Stored> param = four(a.param, i);
  Vector<Grad::Stored> grad = four(a.grad, i);
  Vector<State::Word> first = four(a.first, i), second;
  if (State::TWO) second = four(a.second, i);
  Vector<Copy::Stored> copy;
#pragma unroll
  for (int k = 0; k < WIDTH; k++) {
    float p = Param::load(param.x[k]), g = Grad::load(grad.x[k]) * a.factor;
    State::Code one = first.x[k], two = State::TWO ? second.x[k] : one;
    step<State>(a.scalars, p, g, one, two);
    first.x[k] = (State::Word)one;
    if (State::TWO) second.x[k] = (State::Word)two;
    param.x[k] = Param::store(p);
    copy.x[k] = Copy::store(p);
  }
  four(a.param, i) = param;
  four(a.first, i) = first;
  if (State::TWO) four(a.second, i) = second;
  if (COPY != NONE) four(a.copy, i) = copy;
}

// Elements before the first whole vector of this array.
template <class T>
__device__ __forceinline__ int head_of(const T* array) {
  int past = (int)((u64)array & (sizeof(T) * WIDTH - 1)) / (int)sizeof(T);
  return past ? WIDTH - past : 0;
}

// The same for all arrays, or -1 if they don't agree (then everything goes one by one).
__device__ __forceinline__ int head_of(const Arrays& a) {
  int head = head_of(a.param);
  bool agree = head == head_of(a.grad) && head == head_of(a.first);
  if (State::TWO) agree = agree && head == head_of(a.second);
  if (COPY != NONE) agree = agree && head == head_of(a.copy);
  return agree ? head : -1;
}

// One chunk of a row, by the threads of one block. chunk_size is a multiple of WIDTH, so that all chunks have one head.
// Not unrolled, and with 32-bit indices: both save registers. (So does blockDim, where speed does not matter: with THREADS
// one variant spills on sm_80.)
__device__ __forceinline__ void step_chunk(const Row& row, int chunk, int chunk_size) {
  i64 begin = (i64)chunk * chunk_size, rest = row.size - begin;
  const Arrays a = arrays_of(row, begin);
  int size = (int)(rest < chunk_size ? rest : chunk_size), head = head_of(a);
  int first = head < 0 || head > size ? size : head;  // of the vectors
  int last = first + (size - first) / WIDTH * WIDTH;
#pragma unroll 1
  for (int i = first + threadIdx.x * WIDTH; i < last; i += THREADS * WIDTH) step_four(a, i);
#pragma unroll 1
  for (int i = threadIdx.x; i < first; i += blockDim.x) step_one(a, i);
#pragma unroll 1
  for (int i = last + threadIdx.x; i < size; i += blockDim.x) step_one(a, i);
}

// The row whose chunks include this one. first_chunk ascends.
__device__ __forceinline__ int row_of(const Row* rows, int count, int chunk) {
  int low = 0, high = count - 1;
  while (low < high) {
    int middle = (low + high + 1) / 2;
    if (rows[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace balanced_adam

using namespace balanced_adam;

// One long array, whose row comes by value: block b takes chunk b.
extern "C" __global__ void __launch_bounds__(THREADS) balanced_adam_flat(Row row, i64 chunk_size) {
  step_chunk(row, (int)blockIdx.x, (int)chunk_size);
}

// Many arrays: a block takes one chunk of one row of a table in device memory.
extern "C" __global__ void __launch_bounds__(THREADS) balanced_adam_multi(const Row* rows, i64 count, i64 chunk_size) {
  const Row& row = rows[row_of(rows, (int)count, (int)blockIdx.x)];
  step_chunk(row, (int)(blockIdx.x - row.first_chunk), (int)chunk_size);
}

// Writes each row's scalars from a step count and a learning rate that live on the device.
extern "C" __global__ void balanced_adam_prepare(const Recipe* recipes, Row* rows, i64 count) {
  i64 k = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (k < count) rows[k].scalars = prepare(recipes[k]);
}

// Sums of squares of many gradients (of dtype GRAD), in double: one for every thread of every chunk. Squares of floats are
// exact in double, and the order depends on nothing but the sizes.
extern "C" __global__ void __launch_bounds__(THREADS)
    balanced_adam_squares(const Row* rows, i64 count, i64 chunk_size, double* sums) {
  const Row& row = rows[row_of(rows, (int)count, (int)blockIdx.x)];
  i64 begin = (blockIdx.x - row.first_chunk) * chunk_size, rest = row.size - begin;
  const Grad::Stored* grad = (const Grad::Stored*)row.grad + begin;
  ASSUME_GLOBAL(grad);
  int size = (int)(rest < chunk_size ? rest : chunk_size), head = head_of(grad);
  int first = head < size ? head : size, last = first + (size - first) / WIDTH * WIDTH;
  double sum = 0.0;
#pragma unroll 1
  for (int i = first + threadIdx.x * WIDTH; i < last; i += THREADS * WIDTH) {
    Vector<Grad::Stored> vector = four(grad, i);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) sum += (double)Grad::load(vector.x[k]) * Grad::load(vector.x[k]);
  }
  for (int i = threadIdx.x; i < first; i += blockDim.x) sum += (double)Grad::load(grad[i]) * Grad::load(grad[i]);
  for (int i = last + threadIdx.x; i < size; i += blockDim.x) sum += (double)Grad::load(grad[i]) * Grad::load(grad[i]);
  sums[(i64)blockIdx.x * THREADS + threadIdx.x] = sum;
}
