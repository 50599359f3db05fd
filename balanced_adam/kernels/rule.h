// The update rule of balanced_adam/rule.py for one element, for every compiler: g++ and clang (cpu.cpp), NVRTC (cuda.cu).
//
// No includes: NVRTC comes without headers. Everything is IEEE single precision, one rounding per operation and in the
// oracle's order; compile with contraction off (-ffp-contract=off, --fmad=false), or the bits differ from the oracle's.
#pragma once

#if defined(__CUDACC_RTC__) || defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace balanced_adam {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

HOST_DEVICE u32 bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  u32 u;
  __builtin_memcpy(&u, &x, 4);
  return u;
#endif
}

HOST_DEVICE float number(u32 u) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(u);
#else
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
#endif
}

HOST_DEVICE float root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

HOST_DEVICE double root(double x) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

HOST_DEVICE float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// ---- Elements as they lie in memory. Conversions by hand (NVRTC has no cuda_bf16.h), without branches, round to nearest
// even, as torch's. The numbers are those of kernels/table.py.

enum Dtype { NONE = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

template <int D>
struct Element;

template <>
struct Element<FLOAT32> {
  typedef float Stored;
  static HOST_DEVICE float load(float x) { return x; }
  static HOST_DEVICE float store(float x) { return x; }
};

template <>
struct Element<BFLOAT16> {
  typedef u16 Stored;
  static HOST_DEVICE float load(u16 x) { return number((u32)x << 16); }
  static HOST_DEVICE u16 store(float x) {
    u32 u = bits(x);
    u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (u16)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);  // NaN stays NaN
  }
};

template <>
struct Element<FLOAT16> {
  typedef u16 Stored;
  static HOST_DEVICE float load(u16 x) {
    u32 sign = (u32)(x & 0x8000u) << 16, rest = x & 0x7fffu;
    u32 normal = (rest << 13) + 0x38000000u;        // the exponent's bias: 15 becomes 127
    u32 infinite = (rest << 13) | 0x7f800000u;      // infinities and NaN
    u32 denormal = bits(number(0x38800000u | (rest << 13)) - number(0x38800000u));  // 2^-14 (1 + f) - 2^-14, exact
    u32 u = rest >= 0x7c00u ? infinite : normal;
    return number((rest < 0x0400u ? denormal : u) | sign);
  }
  static HOST_DEVICE u16 store(float x) {
    u32 u = bits(x), sign = u & 0x80000000u, size = u ^ sign;
    u32 normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
    u32 denormal = bits(number(size) + 0.5f) - 0x3f000000u;  // 0.5 has fp16's smallest step as its last bit
    u32 h = size < 0x38800000u ? denormal : normal;
    h = size >= 0x47800000u ? 0x7c00u : h;                   // 65536 and more; 65520 and more have rounded up to it
    h = size > 0x7f800000u ? 0x7fffu : h;
    return (u16)(h | (sign >> 16));
  }
};

// ---- The scalars of one step, rounded once from double; kernels/table.py packs them.

struct Scalars {
  float beta1, rest1;  // rest = 1 - beta
  float beta2, rest2;
  float eps;     // eps sqrt(c2), at least the smallest normal number
  float rate;    // lr sqrt(c2) / c1
  float shrink;  // 1 - lr weight_decay
  float sign;    // -1 to maximize
  float spent;   // m becomes 0 where v <= spent: 0 for equal betas, -1 (nowhere) otherwise
  float limit;   // of a bounded direction: c1 / sqrt(c2)
  u32 start;     // of the numbers that round packed moments: balanced_adam.packed.start
};

// ---- The moments as they lie in memory: one or two arrays of words, decoded before the update and encoded after it.

// What rounds w and r of an element: balanced_adam.packed.dither, of the weight before the step and the gradient.
struct Dither {
  u32 w, r;

  HOST_DEVICE Dither(const Scalars& s, float param, float grad) {
    u32 weight = bits(param) & 0x7fffffffu, gradient = bits(grad) & 0x7fffffffu;
    weight = weight > 0x7f800000u ? 0x7f800000u : weight;
    u32 mixed = (weight * 0x85ebca6bu + s.start) ^ gradient;
    w = (mixed ^ (mixed >> 15)) * 0x7feb352du;
    r = (weight & 0xffc00000u) * 0x00000279u + s.start;
  }
};

struct Float32State {
  typedef float Word, Code;  // arrays: exp_avg, exp_avg_sq
  static constexpr bool TWO = true, BOUNDED = false;
  static HOST_DEVICE void decode(Code a, Code b, float& m, float& v) { m = a, v = b; }
  static HOST_DEVICE void encode(const Dither&, float m, float v, Code& a, Code& b) { a = m, b = v; }
};

// balanced_adam.packed, whose FORMATS have the same numbers.
template <class WORD, int W_BITS, int W_SHIFT, u32 W_BASE, int R_BITS, int R_SHIFT, u32 R_BASE, bool NEAREST>
struct PackedState {
  typedef WORD Word;
  typedef u32 Code;  // a word in a register
  static constexpr bool TWO = false, BOUNDED = true;
  static constexpr u32 W_TOP = (1u << W_BITS) - 1u, R_TOP = (1u << (R_BITS - 1)) - 1u;
  static constexpr bool POWERS = W_SHIFT > 23;  // between levels of w lie octaves
  static constexpr float RATIO_LESS_1 = (float)((1 << (1 << (POWERS ? W_SHIFT - 23 : 0))) - 1);

  static HOST_DEVICE u32 scale(u32 w) { return ((w >> 1) & 0x7f800000u) + 0x20000000u; }

  static HOST_DEVICE void decode(Code code, Code, float& m, float& v) {
    u32 w = code & (W_TOP << R_BITS);
    w = (W_SHIFT >= R_BITS ? w << (W_SHIFT - R_BITS) : w >> (R_BITS - W_SHIFT)) + W_BASE;
    float r = number(((code & R_TOP) << R_SHIFT) + R_BASE) - number(R_BASE);
    m = number(bits(r * number(scale(w))) | ((code << (32 - R_BITS)) & 0x80000000u));
    v = number(w) - number(W_BASE);
  }

  // Levels stay where they are in a float's bits, and conditions are combined as integers: shifts are dear, and GCC
  // vectorises no other conditions.
  static HOST_DEVICE void encode(const Dither& dither, float m, float v, Code& code, Code&) {
    float w = v + number(W_BASE);
    u32 level = bits(w) - W_BASE;
    if (!POWERS) {
      level = (level + (NEAREST ? 1u << (W_SHIFT - 1) : dither.w >> (32 - W_SHIFT))) & (~0u << W_SHIFT);
      level = level > W_TOP << W_SHIFT ? W_TOP << W_SHIFT : level;
    } else {
      level = level & (~0u << W_SHIFT);
      level = level > (W_TOP - 1u) << W_SHIFT ? (W_TOP - 1u) << W_SHIFT : level;
      float between = (float)(int)(dither.w >> 9) * (RATIO_LESS_1 * 1.1920928955078125e-07f) + 1.0f;
      level += w > number(level + W_BASE) * between ? 1u << W_SHIFT : 0u;
    }
    float r = number(bits(m) & 0x7fffffffu) * number(0x7f000000u - scale(level + W_BASE));
    u32 size = bits(r + number(R_BASE)) - R_BASE;
    size = (size + (NEAREST ? 1u << (R_SHIFT - 1) : dither.r >> (32 - R_SHIFT))) >> R_SHIFT;
    size = size > R_TOP ? R_TOP : size;
    u32 sign = bits(m) > 0xff800000u ? 0u : bits(m) & 0x80000000u;  // that of NaN is anybody's guess
    level = W_SHIFT >= R_BITS ? level >> (W_SHIFT - R_BITS) : level << (R_BITS - W_SHIFT);
    code = level | (sign >> (32 - R_BITS)) | size;
  }
};

typedef PackedState<u32, 17, 13, 0x17800000u, 15, 10, 0x3f000000u, true> Packed32State;
typedef PackedState<u16, 9, 20, 0x24800000u, 7, 19, 0x3dd00000u, false> Packed16State;
typedef PackedState<u8, 4, 25, 0x24800000u, 4, 22, 0x3dc00000u, false> Packed8State;

// One tensor, or a piece of one. CUDA reads a table of these from device memory.
struct Row {
  void* param;
  void* grad;  // written only where the scaled gradient is to be kept
  void* copy;  // 16-bit (or other) copy of the new weights, or null
  void* first;   // exp_avg, or packed words
  void* second;  // exp_avg_sq, or null
  const float* factor;  // multiplies the gradient (unscaling, clipping), or null for 1
  i64 size;             // elements
  i64 first_chunk;      // of the rows before this one (CUDA, several tensors)
  Scalars scalars;
};

constexpr float SMALLEST_NORMAL = 1.17549435e-38f;

// Denormals become zero; NaN stays NaN.
HOST_DEVICE float flush(float x) { return (bits(x) & 0x7fffffffu) < 0x00800000u ? 0.0f : x; }

// balanced_adam.rule.direction
template <bool BOUNDED>
HOST_DEVICE float bounded_direction(const Scalars& s, float m, float v) {
  float move = quotient(m, root(v) + s.eps);
  if (BOUNDED) {
    move = s.limit < move ? s.limit : move;
    move = -s.limit > move ? -s.limit : move;
  }
  return move;
}

// equation by equation, balanced_adam.rule.update
template <bool BOUNDED>
HOST_DEVICE void update(const Scalars& s, float& param, float grad, float& m, float& v) {
  m = m * s.beta1 + grad * s.rest1;
  v = v * s.beta2 + (grad * grad) * s.rest2;
  if (!BOUNDED) {
    m = flush(m), v = flush(v);
    m = number(bits(m) & (v <= s.spent ? 0u : 0xffffffffu));  // of m = ... ? 0 : m GCC makes two divisions
  }
  float move = bounded_direction<BOUNDED>(s, m, v);
  param = param * s.shrink - move * s.rate;
}

// One step of an element: its moments decoded, updated, encoded.
template <class State>
HOST_DEVICE void step(const Scalars& s, float& param, float grad, typename State::Code& first, typename State::Code& second) {
  float m, v;
  State::decode(first, second, m, v);
  const Dither dither(s, param, grad);
  update<State::BOUNDED>(s, param, grad, m, v);
  State::encode(dither, m, v, first, second);
}

// ---- What balanced_adam.rule.bias_correction does, where the step count and lr live on the device (CUDA graphs).

struct Recipe {
  float* step;      // of this tensor, counted from 0; advanced here
  const float* lr;  // or null: lr_value
  double lr_value, beta1, beta2, eps, weight_decay;
  double sign;
};

HOST_DEVICE double power(double base, i64 exponent) {  // as balanced_adam.rule.power: the same bits everywhere
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

HOST_DEVICE Scalars prepare(const Recipe& r) {
  *r.step += 1.0f;
  i64 step = (i64)*r.step;
  double lr = r.lr ? (double)*r.lr : r.lr_value;
  double c2 = 1.0 - power(r.beta2, step), root2 = root(c2), eps = r.eps * root2;
  bool tied = r.beta1 == r.beta2;
  double scale = tied ? 1.0 / root2 : root2 / (1.0 - power(r.beta1, step));
  Scalars s;
  s.beta1 = (float)r.beta1, s.rest1 = (float)(1.0 - r.beta1);
  s.beta2 = (float)r.beta2, s.rest2 = (float)(1.0 - r.beta2);
  s.eps = eps > SMALLEST_NORMAL ? (float)eps : SMALLEST_NORMAL;
  s.rate = (float)(lr * scale), s.shrink = (float)(1.0 - lr * r.weight_decay);
  s.sign = (float)r.sign, s.spent = tied ? 0.0f : -1.0f;
  s.limit = (float)(1.0 / scale);
  s.start = (u32)step * 0x9e3779b9u;
  return s;
}

}  // namespace balanced_adam
