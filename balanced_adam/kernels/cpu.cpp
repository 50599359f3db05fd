// The CPU kernels: plain loops around rule.h behind a plain C ABI (kernels/cpu.py loads it with ctypes).
//
// One library serves every processor of an architecture: the loops are compiled for several instruction sets and chosen at
// run time. They have the same bits (rule.h). Threads come from torch's own OpenMP runtime, handed in at load time, so that
// this library needs none and no second one appears in the process.
#include <stdlib.h>

#include "rule.h"

using namespace balanced_adam;

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

namespace {

// ---- The loops. always_inline, so that each instruction set below compiles its own.

// Memory is asked for this many elements ahead, BLOCK by BLOCK: the hardware's own prefetching stops at the end of a page,
// and a step reads four arrays at once. Measured: 1.1 times as fast as without on an Intel Xeon, where 640 and 256 were best.
// On AMD's Zen 4 the same costs a third of the speed, so it is left to the processors that it helps.
constexpr i64 AHEAD = 640, BLOCK = 256, LINE = 64;

bool prefetching_helps() {
#ifdef __x86_64__
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const bool PREFETCHES = prefetching_helps();

template <class T>
INLINE void prefetch(const T* array, i64 index, bool for_writing) {
  const char* bytes = (const char*)(array + index);
  for (i64 k = 0; k < BLOCK * (i64)sizeof(T); k += LINE) {
    if (for_writing)
      __builtin_prefetch(bytes + k, 1);
    else
      __builtin_prefetch(bytes + k, 0);
  }
}

template <class State, int PARAM, int GRAD, int COPY, bool KEEP>
INLINE void step_range(const Row& row, i64 begin, i64 end) {
  typedef typename Element<PARAM>::Stored Param;
  typedef typename Element<GRAD>::Stored Grad;
  typedef typename Element<COPY == NONE ? FLOAT32 : COPY>::Stored Copy;
  const Scalars s = row.scalars;
  const float factor = (row.factor ? *row.factor : 1.0f) * s.sign;
  Param* __restrict param = (Param*)row.param;
  Grad* __restrict grad = (Grad*)row.grad;
  Copy* __restrict copy = (Copy*)row.copy;
  typename State::Word* __restrict first = (typename State::Word*)row.first;
  typename State::Word* __restrict second = (typename State::Word*)row.second;
  for (i64 at = begin; at < end; at += BLOCK) {
    if (PREFETCHES) {
      prefetch(param, at + AHEAD, true);
      prefetch(grad, at + AHEAD, KEEP);
      prefetch(first, at + AHEAD, true);
      if (State::TWO) prefetch(second, at + AHEAD, true);
    }
    const i64 stop = at + BLOCK < end ? at + BLOCK : end;
    // The arrays are distinct; __restrict on local pointers does not tell GCC so.
#pragma GCC ivdep
    for (i64 i = at; i < stop; i++) {
      float p = Element<PARAM>::load(param[i]), g = Element<GRAD>::load(grad[i]) * factor;
      if (KEEP) grad[i] = Element<GRAD>::store(g * s.sign);
      typename State::Code a = first[i], b = State::TWO ? second[i] : a;
      step<State>(s, p, g, a, b);
      first[i] = (typename State::Word)a;
      if (State::TWO) second[i] = (typename State::Word)b;
      param[i] = Element<PARAM>::store(p);
      if (COPY != NONE) copy[i] = (Copy)Element<COPY == NONE ? FLOAT32 : COPY>::store(p);
    }
  }
}

struct Variant {
  int param, grad, copy, keep, state;
};

template <class State, int GRAD>
INLINE void master_range(const Variant& v, const Row& row, i64 begin, i64 end) {
  if (v.copy == NONE && !v.keep) step_range<State, FLOAT32, GRAD, NONE, false>(row, begin, end);
  if (v.copy == FLOAT32 && !v.keep) step_range<State, FLOAT32, GRAD, FLOAT32, false>(row, begin, end);
  if (v.copy == BFLOAT16 && !v.keep) step_range<State, FLOAT32, GRAD, BFLOAT16, false>(row, begin, end);
  if (v.copy == FLOAT16 && !v.keep) step_range<State, FLOAT32, GRAD, FLOAT16, false>(row, begin, end);
  if (GRAD != FLOAT32) return;  // only CPU offload keeps the scaled gradient, and its gradients are fp32
  if (v.copy == NONE && v.keep) step_range<State, FLOAT32, FLOAT32, NONE, true>(row, begin, end);
  if (v.copy == FLOAT32 && v.keep) step_range<State, FLOAT32, FLOAT32, FLOAT32, true>(row, begin, end);
  if (v.copy == BFLOAT16 && v.keep) step_range<State, FLOAT32, FLOAT32, BFLOAT16, true>(row, begin, end);
  if (v.copy == FLOAT16 && v.keep) step_range<State, FLOAT32, FLOAT32, FLOAT16, true>(row, begin, end);
}

template <class State>
INLINE void state_range(const Variant& v, const Row& row, i64 begin, i64 end) {
  if (v.param == BFLOAT16) return step_range<State, BFLOAT16, BFLOAT16, NONE, false>(row, begin, end);
  if (v.param == FLOAT16) return step_range<State, FLOAT16, FLOAT16, NONE, false>(row, begin, end);
  if (v.grad == FLOAT32) return master_range<State, FLOAT32>(v, row, begin, end);
  if (v.grad == BFLOAT16) return master_range<State, BFLOAT16>(v, row, begin, end);
  if (v.grad == FLOAT16) return master_range<State, FLOAT16>(v, row, begin, end);
}

// The states, with their numbers in kernels/table.py.
#ifndef STATES
#define STATES(DO) DO(0, Float32State) DO(1, Packed32State) DO(2, Packed16State) DO(3, Packed8State)
#endif

INLINE void any_range(const Variant& v, const Row& row, i64 begin, i64 end) {
#define STEP(NUMBER, STATE) \
  if (v.state == NUMBER) return state_range<STATE>(v, row, begin, end);
  STATES(STEP)
#undef STEP
}

// Sum of squares in double, in an order that depends on nothing but the length: element i goes to lane i % LANES.
// Squares of floats are exact in double. Other data is made floats in stages, since GCC vectorises either loop alone.
constexpr int LANES = 16, STAGE = 512;

INLINE void add_squares(const float* values, int count, double (&lanes)[LANES]) {
  int whole = count / LANES * LANES;
  for (int i = 0; i < whole; i += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += (double)values[i + lane] * values[i + lane];
  for (int i = whole; i < count; i++) lanes[i - whole] += (double)values[i] * values[i];
}

INLINE double total(const double (&lanes)[LANES]) {
  double sum = 0.0;
  for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
  return sum;
}

// What the elements of a row come to.
struct Measure {
  double squares;  // their sum
  float greatest;  // of their absolute values; NaN if one is
};

template <int GRAD>
INLINE Measure gradient_range(const Row& row, i64 begin, i64 end) {
  double lanes[LANES] = {};
  float buffer[STAGE];
  for (i64 at = begin; at < end; at += STAGE) {
    const typename Element<GRAD>::Stored* x = (const typename Element<GRAD>::Stored*)row.grad + at;
    int count = end - at < STAGE ? (int)(end - at) : STAGE;
    for (int i = 0; GRAD != FLOAT32 && i < count; i++) buffer[i] = Element<GRAD>::load(x[i]);
    add_squares(GRAD == FLOAT32 ? (const float*)x : buffer, count, lanes);
  }
  return {total(lanes), 0.0f};
}

// Of the update's direction, as balanced_adam.rule.direction.
template <class State>
INLINE Measure direction_range(const Row& row, i64 begin, i64 end) {
  double lanes[LANES] = {};
  float buffer[STAGE];
  u32 greatest = 0;
  for (i64 at = begin; at < end; at += STAGE) {
    const typename State::Word* first = (const typename State::Word*)row.first + at;
    const typename State::Word* second = (const typename State::Word*)row.second + at;
    int count = end - at < STAGE ? (int)(end - at) : STAGE;
    for (int i = 0; i < count; i++) {
      float m, v;
      State::decode(first[i], State::TWO ? second[i] : first[i], m, v);
      buffer[i] = bounded_direction<State::BOUNDED>(row.scalars, m, v);
    }
    for (int i = 0; i < count; i++) {
      u32 size = bits(buffer[i]) & 0x7fffffffu;  // ordered as the numbers are, with NaN beyond infinity
      greatest = size > greatest ? size : greatest;
    }
    add_squares(buffer, count, lanes);
  }
  return {total(lanes), number(greatest)};
}

// grad: the dtype of the gradients to be measured, or NONE for the directions.
INLINE Measure any_measure(int grad, int state, const Row& row, i64 begin, i64 end) {
  if (grad == FLOAT32) return gradient_range<FLOAT32>(row, begin, end);
  if (grad == BFLOAT16) return gradient_range<BFLOAT16>(row, begin, end);
  if (grad == FLOAT16) return gradient_range<FLOAT16>(row, begin, end);
#define MEASURE(NUMBER, STATE) \
  if (state == NUMBER) return direction_range<STATE>(row, begin, end);
  STATES(MEASURE)
#undef MEASURE
  return {0.0, 0.0f};
}

// ---- One copy of the loops for each instruction set.

struct Loops {
  void (*step)(const Variant&, const Row&, i64, i64);
  Measure (*measure)(int, int, const Row&, i64, i64);
};

#define FOR(NAME, TARGET)                                                                           \
  __attribute__((noinline)) TARGET void step_##NAME(const Variant& v, const Row& r, i64 b, i64 e) { \
    any_range(v, r, b, e);                                                                          \
  }                                                                                                 \
  __attribute__((noinline)) TARGET Measure measure_##NAME(int g, int s, const Row& r, i64 b, i64 e) { \
    return any_measure(g, s, r, b, e);                                                                \
  }

FOR(baseline, )
#ifdef __x86_64__
FOR(avx2, __attribute__((target("avx2"))))
FOR(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))

const Loops LOOPS[] = {
    {step_baseline, measure_baseline}, {step_avx2, measure_avx2}, {step_avx512, measure_avx512}};
#else
const Loops LOOPS[] = {{step_baseline, measure_baseline}};
#endif

// ---- The floating point environment: callers may flush denormals (torch.set_flush_denormal), which would change bits.

class DefaultEnvironment {
#ifdef __x86_64__
  unsigned saved = __builtin_ia32_stmxcsr();

 public:
  DefaultEnvironment() { __builtin_ia32_ldmxcsr(0x1f80); }
  ~DefaultEnvironment() { __builtin_ia32_ldmxcsr(saved); }
#elif defined(__aarch64__)
  u64 saved;

 public:
  DefaultEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" ::"r"((u64)0));
  }
  ~DefaultEnvironment() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};

// ---- Threads.

constexpr i64 SERIAL = 32768;  // fewer elements aren't worth waking threads for
constexpr i64 SUMMED = 16384;  // elements summed on their own in a measure; fixes its order, so don't tune it

void (*omp_parallel)(void (*)(void*), void*, unsigned, unsigned);
int (*omp_thread)();
int (*omp_threads)();

template <class Job>
void run(Job& job, i64 elements, int threads) {
  if (threads <= 1 || elements < SERIAL || !omp_parallel) {
    DefaultEnvironment environment;
    job.part(0, 1);
    return;
  }
  omp_parallel(
      [](void* data) {
        DefaultEnvironment environment;
        ((Job*)data)->part(omp_thread(), omp_threads());
      },
      &job, threads, 0);
}

struct StepJob {
  const Row* rows;
  i64 count, total;
  Variant variant;
  const Loops& loops;

  // This thread's share of all elements, cut at multiples of 64 so that threads share few cache lines.
  void part(int thread, int threads) const {
    i64 share = (total + threads - 1) / threads, begin = ((share * thread) + 63) / 64 * 64;
    i64 end = (share * (thread + 1) + 63) / 64 * 64, offset = 0;
    for (const Row* row = rows; row < rows + count && offset < end; offset += row++->size) {
      i64 from = begin > offset ? begin - offset : 0, to = end - offset < row->size ? end - offset : row->size;
      if (from < to) loops.step(variant, *row, from, to);
    }
  }
};

struct MeasureJob {
  const Row* rows;
  i64 count, blocks;
  int grad, state;
  Measure* measures;  // one per block
  const Loops& loops;

  void part(int thread, int threads) const {
    i64 begin = blocks * thread / threads, end = blocks * (thread + 1) / threads, block = 0;
    for (const Row* row = rows; row < rows + count; row++)
      for (i64 from = 0; from < row->size; from += SUMMED, block++)
        if (begin <= block && block < end)
          measures[block] = loops.measure(grad, state, *row, from, from + SUMMED < row->size ? from + SUMMED : row->size);
  }
};

}  // namespace

// Size of Row, so that the caller can check that it packs the same.
EXPORT int balanced_adam_cpu_row_size() { return sizeof(Row); }

// The greatest instruction set that this processor has; 0 is the baseline of its architecture.
EXPORT int balanced_adam_cpu_best_isa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2")) return 1;
#endif
  return 0;
}

// GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that torch uses.
EXPORT void balanced_adam_cpu_use_openmp(void* parallel, void* thread, void* threads) {
  omp_parallel = (void (*)(void (*)(void*), void*, unsigned, unsigned))parallel;
  omp_thread = (int (*)())thread;
  omp_threads = (int (*)())threads;
}

// One step of every row. Dtypes are rule.h's; keep stores factor * grad in place of grad; state is 0 for fp32 moments, or 1, 2, 3
// for words of 32, 16, 8 bits.
EXPORT void balanced_adam_cpu_step(const Row* rows, i64 count, int param, int grad, int copy, int keep, int state, int isa,
                                   int threads) {
  StepJob job{rows, count, 0, {param, grad, copy, keep, state}, LOOPS[isa]};
  for (i64 k = 0; k < count; k++) job.total += rows[k].size;
  run(job, job.total, threads);
}

// squares[k] and greatest[k]: the measure of row k's gradient, of dtype grad, or of its direction if grad is NONE.
// Returns 0, or 1 if there was no memory.
EXPORT int balanced_adam_cpu_measure(const Row* rows, i64 count, int grad, int state, double* squares, double* greatest,
                                     int isa, int threads) {
  MeasureJob job{rows, count, 0, grad, state, nullptr, LOOPS[isa]};
  i64 total = 0;
  for (i64 k = 0; k < count; k++) total += rows[k].size, job.blocks += (rows[k].size + SUMMED - 1) / SUMMED;
  job.measures = (Measure*)malloc(sizeof(Measure) * (job.blocks ? job.blocks : 1));
  if (!job.measures) return 1;
  run(job, total, threads);
  const Measure* block = job.measures;
  for (i64 k = 0; k < count; k++) {
    squares[k] = greatest[k] = 0.0;
    for (i64 from = 0; from < rows[k].size; from += SUMMED, block++) {
      squares[k] += block->squares;
      double g = greatest[k];
      greatest[k] = g >= block->greatest || g != g ? g : block->greatest;  // NaN stays, and comes through
    }
  }
  free(job.measures);
  return 0;
}

// rule.h's prepare, so that a test can hold it to the oracle without a GPU.
EXPORT void balanced_adam_cpu_prepare(const Recipe* recipe, Scalars* scalars) { *scalars = prepare(*recipe); }
