// Selective scan for CPUs, forward and backward, called by XLA through its foreign function interface (see native.py).
//
// A vector register holds neighbouring channels, one register per state, and time is a plain loop. Work is cut into
// tasks: one sequence times a range of channels. A task walks over time in chunks of kChunk steps and, inside a chunk,
// over its blocks of kLanes channels, so that memory is read in long rows and everything else stays in the caches.
//
// The forward pass can keep the state at the start of every chunk. The backward pass takes the chunks in the opposite
// order, replays each one from its kept state and runs the adjoint recurrence through it; no other state ever reaches
// memory. The caller decides from the shapes alone into how many ranges the channels of a group are cut, and every task
// writes its own results (sums over the batch and the ranges are left to the caller). So the results are the same to
// the bit whatever the number of threads.

#if defined(__aarch64__) && !defined(__clang__)
// Left to itself, GCC moves instructions so far apart that the registers do not suffice.
#pragma GCC optimize("no-schedule-insns", "rename-registers")
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Vectors: the GCC and Clang extension, as wide as a register of the machine this is compiled for.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kMaxStates = 16;  // states kept in registers at once
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kMaxStates = 8;
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kMaxStates = 16;
#else
constexpr int kMaxStates = 8;
#endif
#define EVEN_LANES 0, 2, 4, 6
#define ODD_LANES 1, 3, 5, 7
#endif
#if defined(__aarch64__)
constexpr int kTogether = 4;  // states computed side by side, each hiding the latency of the others
#else
constexpr int kTogether = 1;  // processors and compilers see to it themselves
#endif
#define UNROLL _Pragma("GCC unroll 16")  // so that arrays of vectors are registers

constexpr int kCacheLine = 64;
constexpr int kChunk = CHUNK;  // steps between two kept states, a macro that native.py sets

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float MemoryVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint16_t MemoryHalves __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

inline Vec Splat(float x) { return x - Vec{}; }

// sum + x y, which on ARM overwrites the sum; left to itself, GCC may choose the other product of h a + x y to add to.
inline Vec MultiplyAdd(Vec sum, Vec x, Vec y) {
#if defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)y);
#else
  return sum + x * y;
#endif
}

// The order of the operands lets a NaN in x come out again. Compilers do not find these instructions by themselves.
#if defined(__AVX512F__)
inline Vec AtLeast(Vec x, float low) { return (Vec)_mm512_max_ps((__m512)Splat(low), (__m512)x); }
inline Vec AtMost(Vec x, float high) { return (Vec)_mm512_min_ps((__m512)Splat(high), (__m512)x); }
#elif defined(__AVX__)
inline Vec AtLeast(Vec x, float low) { return (Vec)_mm256_max_ps((__m256)Splat(low), (__m256)x); }
inline Vec AtMost(Vec x, float high) { return (Vec)_mm256_min_ps((__m256)Splat(high), (__m256)x); }
#elif defined(__aarch64__)
inline Vec AtLeast(Vec x, float low) { return (Vec)vmaxq_f32((float32x4_t)x, (float32x4_t)Splat(low)); }
inline Vec AtMost(Vec x, float high) { return (Vec)vminq_f32((float32x4_t)x, (float32x4_t)Splat(high)); }
#else
inline Vec AtLeast(Vec x, float low) { return Splat(low) > x ? Splat(low) : x; }
inline Vec AtMost(Vec x, float high) { return Splat(high) < x ? Splat(high) : x; }
#endif
inline Vec MinusAbs(Vec x) { return x < Splat(0) ? x : -x; }

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^f for f in [-1/2, 1/2]: 1 + f q(f) with a minimax polynomial q. Relative error 1.5e-7, exact at f = 0.
inline Vec Mantissa(Vec f) {
  Vec q = 0.0013264727f * f + 0.0096715128f;
  q = q * f + 0.0555073374f;
  q = q * f + 0.2402224208f;
  q = q * f + 0.6931469776f;
  return q * f + 1.0f;
}

// 2^(i / kCount), from 2^(1 / kCount).
template <int kCount>
struct Roots {
  float of[kCount];
  constexpr explicit Roots(double root) : of() {
    double power = 1;
    for (float& x : of) {
      x = static_cast<float>(power);
      power *= root;
    }
  }
};

// Exp2 is the decay, where half of the time goes: a few bits of x choose a root from a table, if there is an instruction
// for that, and a polynomial shorter than Mantissa does the rest. Relative error 2.5e-7; below 9e-8 from -1/64 to 0,
// where errors add up over many steps; exact at 0.
#if defined(__AVX512DQ__)
alignas(64) constexpr Roots<32> kRoots(1.0218971486541166);

// Rounding x + 1/64 adds to the error what rounding x does. Its whole part is the exponent, the next five bits the root.
inline Vec Exp2(Vec x) {
  x += 1.0f / 64;
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 5 << 4 | _MM_FROUND_TO_NEG_INF);  // in [0, 1/32]; 0 if x is infinite
  const __m512 index = _mm512_add_round_ps((__m512)x, (__m512)Splat(1.5f * (1 << 18)),  // leaves 32 x in the low bits
                                           _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 low = _mm512_load_ps(kRoots.of), high = _mm512_load_ps(kRoots.of + 16);
  const Vec root = (Vec)_mm512_permutex2var_ps(low, (__m512i)index, high);
  const Vec mantissa = root * ((0.240226492f * f + 0.685650229f) * f + 0.989228070f);
  return (Vec)_mm512_scalef_ps((__m512)mantissa, (__m512)x);  // times 2 to the whole number below x
}

// e^x for x <= 0, once per position and channel.
inline Vec Exp(Vec x) {
  x = AtLeast(x, -88.0f);
  const Vec rounded = (Vec)_mm512_roundscale_ps((__m512)(x * kLog2e), 0);
  const Vec f = (Vec)_mm512_fmsub_ps((__m512)x, (__m512)Splat(kLog2e), (__m512)rounded)  // exact
                + x * 1.92596299e-8f;                                                    // the rest of log2(e)
  return (Vec)_mm512_scalef_ps((__m512)Mantissa(f), (__m512)rounded);
}
#else
// Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, here with the exponent's bias.
constexpr float kShift = 12582912.0f + 127.0f;

// 2^(n + f) for n = shifted - kShift in [-127, 128], which becomes the exponent field: zero at -127, infinite at 128.
inline Vec Power(Vec f, Vec shifted) { return Mantissa(f) * (Vec)((Bits)shifted << 23); }

#if defined(__AVX2__) && !defined(__AVX512F__)
alignas(32) constexpr Roots<8> kRoots(1.0905077326652577);

inline Vec Exp2(Vec x) {
  x = AtMost(AtLeast(x, -127.0f), 128.0f);
  const Vec shifted = x + 1.5f * (1 << 20), f = x - (shifted - 1.5f * (1 << 20));  // leaves 8 x in the low bits
  // The bits that choose the root would reach the mantissa with the exponent; the table makes up for it.
  const Bits table = (Bits)_mm256_load_ps(kRoots.of) - (Bits{EVEN_LANES} << 19);
  const Bits root = (Bits)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)shifted);
  return (Vec)(root + ((Bits)shifted << 20)) * (((0.05550277f * f + 0.24023429f) * f + 0.69314718f) * f + 1.0f);
}
#elif defined(__aarch64__)
// accumulator + x * factors[kLane]. Written as an intrinsic, GCC spreads each factor over a register of its own.
template <int kLane>
inline float32x4_t MultiplyAdd(float32x4_t accumulator, float32x4_t x, float32x4_t factors) {
  asm("fmla %0.4s, %1.4s, %2.s[%c3]" : "+w"(accumulator) : "w"(x), "w"(factors), "i"(kLane));
  return accumulator;
}

// A multiply-add overwrites its addend. Constant ones are read from memory each time (hence volatile): a copy from
// another register would take the place of arithmetic, while loads have units of their own.
constexpr struct {
  float third[4], first[4], one[4];
} kAddends alignas(16) = {{0.0555073374f, 0.0555073374f, 0.0555073374f, 0.0555073374f},
                          {0.6931469776f, 0.6931469776f, 0.6931469776f, 0.6931469776f},
                          {1, 1, 1, 1}};
inline float32x4_t Addend(const float* constant) { return *(const volatile float32x4_t*)constant; }

// Power with Mantissa in Estrin's form.
template <int N>
inline void Exp2(Vec (&x)[N]) {
  constexpr float32x4_t factors{0.2402224208f, 0.0096715128f, 0.0013264727f, 0};
  Vec shifted[N];
  float32x4_t f[N], square[N], high[N], q[N], mantissa[N];
  UNROLL for (int i = 0; i < N; ++i) x[i] = AtLeast(x[i], -127.0f);
  UNROLL for (int i = 0; i < N; ++i) x[i] = AtMost(x[i], 128.0f);
  UNROLL for (int i = 0; i < N; ++i) shifted[i] = x[i] + kShift;
  UNROLL for (int i = 0; i < N; ++i) f[i] = (float32x4_t)(shifted[i] - kShift);
  UNROLL for (int i = 0; i < N; ++i) f[i] = (float32x4_t)x[i] - f[i];
  UNROLL for (int i = 0; i < N; ++i) high[i] = MultiplyAdd<1>(Addend(kAddends.third), f[i], factors);
  UNROLL for (int i = 0; i < N; ++i) q[i] = MultiplyAdd<0>(Addend(kAddends.first), f[i], factors);
  UNROLL for (int i = 0; i < N; ++i) square[i] = f[i] * f[i];
  UNROLL for (int i = 0; i < N; ++i) high[i] = MultiplyAdd<2>(high[i], square[i], factors);
  UNROLL for (int i = 0; i < N; ++i) q[i] = vfmaq_f32(q[i], square[i], high[i]);
  UNROLL for (int i = 0; i < N; ++i) mantissa[i] = vfmaq_f32(Addend(kAddends.one), f[i], q[i]);
  UNROLL for (int i = 0; i < N; ++i) x[i] = (Vec)mantissa[i] * (Vec)((Bits)shifted[i] << 23);
}
#else
inline Vec Exp2(Vec x) {
  x = AtMost(AtLeast(x, -127.0f), 128.0f);
  const Vec shifted = x + kShift;
  return Power(x - (shifted - kShift), shifted);
}
#endif

// e^x for x <= 0, once per position and channel; n log(2) is subtracted in two parts, to be exact for large |x|.
inline Vec Exp(Vec x) {
  x = AtLeast(x, -88.0f);
  const Vec shifted = x * kLog2e + kShift, n = shifted - kShift;
  return Power(((x - n * 0.693359375f) + n * 2.12194440e-4f) * kLog2e, shifted);
}
#endif

#if !defined(__aarch64__)
template <int N>
inline void Exp2(Vec (&x)[N]) {
  UNROLL for (int i = 0; i < N; ++i) x[i] = Exp2(x[i]);
}
#endif

// log(1 + w) for w in [0, 1]: w times a minimax polynomial.
inline Vec Log1p(Vec w) {
  Vec q = 0.0052326929f * w - 0.0295052358f;
  q = q * w + 0.0782259520f;
  q = q * w - 0.1366324632f;
  q = q * w + 0.1910600731f;
  q = q * w - 0.2484298247f;
  q = q * w + 0.3331909686f;
  q = q * w - 0.4999949315f;
  return (q * w + 0.9999999699f) * w;
}

// Functions of x that start from e^-|x|.
inline Vec Sigmoid(Vec x, Vec exp_minus_abs) {
  const Vec numerator = x < Splat(0) ? exp_minus_abs : Splat(1), denominator = exp_minus_abs + 1.0f;
#if defined(__AVX512F__)
  const Vec reciprocal = (Vec)_mm512_rcp14_ps((__m512)denominator);  // to 14 bits, which one step of Newton doubles
  return numerator * (reciprocal * (2.0f - denominator * reciprocal));
#else
  return numerator / denominator;
#endif
}
// In float32 this is x above 20, as the published kernels have it.
inline Vec Softplus(Vec x, Vec exp_minus_abs) { return AtLeast(x, 0.0f) + Log1p(exp_minus_abs); }

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits{__VA_ARGS__})
#endif

inline Vec PairSums(Vec a, Vec b) { return SHUFFLE(a, b, EVEN_LANES) + SHUFFLE(a, b, ODD_LANES); }

// The sums over the lanes of kLanes vectors, as one vector.
inline Vec LaneSums(const Vec* from) {
  Vec sums[kLanes];
  UNROLL for (int i = 0; i < kLanes; ++i) sums[i] = from[i];
  UNROLL for (int width = kLanes / 2; width > 0; width /= 2) {
    UNROLL for (int i = 0; i < width; ++i) sums[i] = PairSums(sums[2 * i], sums[2 * i + 1]);
  }
  return sums[0];
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory. `lanes` is how many channels of a block exist; the others read as zero and are not written.

inline Vec FromBfloat16(Halves x) {
#if defined(__AVX512BW__)  // one instruction moves each to the upper half of its lane and 0, the 16th, to the lower
  const __m512i from = (__m512i)((Bits{EVEN_LANES} << 15) + 16);
  return (Vec)_mm512_permutexvar_epi16(from, _mm512_zextsi256_si512((__m256i)x));
#elif defined(__AVX2__) && !defined(__AVX512F__)  // here byte by byte, 0x80 is 0
  const __m256i from = (__m256i)(Bits{EVEN_LANES} * 0x01010000 + 0x01008080);
  return (Vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256((__m128i)x), from);
#elif defined(__aarch64__)
  return (Vec)vshll_n_u16((uint16x4_t)x, 16);
#else
  return (Vec)(__builtin_convertvector(x, Bits) << 16);
#endif
}

inline Halves ToBfloat16(Vec v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits x = (Bits)v;
  const Bits rounded = (x + 0x7fff + ((x >> 16) & 1)) >> 16;
  // rounding could carry a NaN into infinity
  return __builtin_convertvector(v == v ? rounded : (x >> 16) | 0x40, Halves);
#endif
}

inline Vec FromFloat16(Halves halves) {
  const Bits x = __builtin_convertvector(halves, Bits), magnitude = x & 0x7fff;
  const Bits special = magnitude << 13 | 0x7f800000;  // infinity and NaN
  const Bits normal = (magnitude << 13) + (112u << 23);
  const Bits subnormal = (Bits)(__builtin_convertvector((Int)magnitude, Vec) * 0x1p-24f);
  const Bits value = magnitude >= 0x7c00 ? special : magnitude < 0x0400 ? subnormal : normal;
  return (Vec)(value | (x & 0x8000) << 16);
}

inline Halves ToFloat16(Vec v) {
  const Bits sign = (Bits)v & 0x80000000, x = (Bits)v ^ sign;
  const Bits normal = (x - (112u << 23) + 0xfff + ((x >> 13) & 1)) >> 13;
  const Bits subnormal = (Bits)((Vec)x + 0.5f) - 0x3f000000;  // the addition rounds to multiples of 2^-24
  Bits half = x < Bits{} + 0x38800000 ? subnormal : normal;
  half = x < Bits{} + 0x477ff000 ? half : Bits{} + 0x7c00;  // rounds to infinity
  half = x > Bits{} + 0x7f800000 ? Bits{} + 0x7e00 : half;  // NaN
  return __builtin_convertvector(half | sign >> 16, Halves);
}

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec Load(const float* from, int lanes = kLanes) {
  if (lanes == kLanes) return *reinterpret_cast<const MemoryVec*>(from);
  Vec v{};
  std::memcpy(&v, from, lanes * sizeof(float));
  return v;
}

inline void Store(float* to, Vec v, int lanes = kLanes) {
  if (lanes == kLanes)
    *reinterpret_cast<MemoryVec*>(to) = v;
  else
    std::memcpy(to, &v, lanes * sizeof(float));
}

inline Halves LoadHalves(const void* from, int lanes) {
  if (lanes == kLanes) return *static_cast<const MemoryHalves*>(from);
  Halves halves{};
  std::memcpy(&halves, from, lanes * sizeof(uint16_t));
  return halves;
}

inline void StoreHalves(void* to, Halves halves, int lanes) {
  if (lanes == kLanes)
    *static_cast<MemoryHalves*>(to) = halves;
  else
    std::memcpy(to, &halves, lanes * sizeof(uint16_t));
}

inline Vec Load(const Bfloat16* from, int lanes) { return FromBfloat16(LoadHalves(from, lanes)); }
inline Vec Load(const Float16* from, int lanes) { return FromFloat16(LoadHalves(from, lanes)); }
inline void Store(Bfloat16* to, Vec v, int lanes) { StoreHalves(to, ToBfloat16(v), lanes); }
inline void Store(Float16* to, Vec v, int lanes) { StoreHalves(to, ToFloat16(v), lanes); }

// Working memory of one thread.
class Arena {
 public:
  explicit Arena(float* free) : free_(free) {}
  Vec* Zeros(int64_t vectors) {
    Vec* taken = reinterpret_cast<Vec*>(free_);
    free_ += vectors * kLanes;
    std::fill_n(taken, vectors, Vec{});
    return taken;
  }

 private:
  float* free_;
};

// ---------------------------------------------------------------------------------------------------------------------
// The recurrences, over `count` steps of one block of channels and N of its states.

// B or C over the steps of a chunk: one number per state for all lanes (kSplat) or a vector per state, for matrices
// that differ between channels. Step k starts at data + at[k].
struct Matrix {
  const float* data;
  const int64_t* at;

  template <bool kSplat>
  Vec Get(int64_t k, int n) const {
    return kSplat ? Splat(data[at[k] + n]) : Load(data + at[k] + n * kLanes);
  }
};

// A chunk of one block of channels, step by step: what both passes need, and what the backward pass adds.
struct Steps {
  Vec delta[kChunk], u[kChunk], input[kChunk], y[kChunk], gate[kChunk];  // input is delta u
};

struct Gradients {
  Vec delta_slope[kChunk], gate_slope[kChunk];  // of softplus, of silu
  Vec y[kChunk], core[kChunk];                  // incoming, after and before the gate
  Vec delta[kChunk], u[kChunk];                 // outgoing
};

// Of one step and state: the decay exp(delta A), and what it leaves of the state before. They are neighbours because
// ARM stores two registers at the price of one.
struct Kept {
  Vec decay, carried;
};

// From the first step to the last, with kKeep keeping what the adjoint recurrence needs. A is in units of log(2):
// A[n] * log2(e).
template <int N, bool kSplat, bool kKeep>
void Forward(int count, Steps& steps, Matrix B, Matrix C, const Vec* A, Vec* state, Kept* __restrict kept) {
  constexpr int kPart = std::min(N, kTogether);
  Vec h[N];
  UNROLL for (int n = 0; n < N; ++n) h[n] = state[n];
  for (int k = 0; k < count; ++k) {
    const Vec delta = steps.delta[k], input = steps.input[k];
    Vec y = steps.y[k];
    UNROLL for (int first = 0; first < N; first += kPart) {
      Vec decay[kPart];
      UNROLL for (int i = 0; i < kPart; ++i) decay[i] = delta * A[first + i];
      Exp2(decay);
      UNROLL for (int i = 0; i < kPart; ++i) h[first + i] *= decay[i];
      if constexpr (kKeep)
        UNROLL for (int i = 0; i < kPart; ++i) kept[k * N + first + i] = {decay[i], h[first + i]};
      UNROLL for (int n = first; n < first + kPart; ++n) h[n] = MultiplyAdd(h[n], input, B.Get<kSplat>(k, n));
      UNROLL for (int n = first; n < first + kPart; ++n) y = MultiplyAdd(y, h[n], C.Get<kSplat>(k, n));
    }
    steps.y[k] = y;
  }
  UNROLL for (int n = 0; n < N; ++n) state[n] = h[n];
}

// The adjoint recurrence, from the last step to the first. dB and dC of step k are at k * dB_stride and k * dC_stride.
template <int N, bool kSplat>
void Adjoint(int count, const Steps& steps, Gradients& grads, Matrix B, Matrix C, const Vec* A, const Kept* kept,
             Vec* d_state, Vec* dA, Vec* dB, int64_t dB_stride, Vec* dC, int64_t dC_stride) {
  Vec dh[N];
  UNROLL for (int n = 0; n < N; ++n) dh[n] = d_state[n];
  for (int k = count - 1; k >= 0; --k) {
    const Vec delta = steps.delta[k], input = steps.input[k], core = grads.core[k], product = core * input;
    Vec through_decay{}, through_input{};
    UNROLL for (int n = 0; n < N; ++n) {
      const Vec b = B.Get<kSplat>(k, n), carried = kept[k * N + n].carried;
      dh[n] += core * C.Get<kSplat>(k, n);
      Vec& sum = dC[k * dC_stride + n];
      sum = MultiplyAdd(MultiplyAdd(sum, core, carried), product, b);
      dB[k * dB_stride + n] += dh[n] * input;
      through_input += dh[n] * b;
      const Vec d_exponent = dh[n] * carried;
      through_decay += d_exponent * A[n];
      dA[n] += d_exponent * delta;
      dh[n] *= kept[k * N + n].decay;
    }
    grads.delta[k] += kLn2 * through_decay + steps.u[k] * through_input;
    grads.u[k] += delta * through_input;
  }
  UNROLL for (int n = 0; n < N; ++n) d_state[n] = dh[n];
}

// Calls f(number of states as a type, first state) over pieces of at most `kMost` that cover all states.
template <int kMost, class F>
void ForStates(int64_t states, F&& f) {
  int64_t first = 0;
  if constexpr (kMost >= 16)
    for (; states - first >= 16; first += 16) f(std::integral_constant<int, 16>{}, first);
  for (; states - first >= 8; first += 8) f(std::integral_constant<int, 8>{}, first);
  for (; states - first >= 4; first += 4) f(std::integral_constant<int, 4>{}, first);
  for (; states - first >= 1; first += 1) f(std::integral_constant<int, 1>{}, first);
}

// ---------------------------------------------------------------------------------------------------------------------
// One call, and the tasks it is cut into.

struct Scan {
  // Groups of channels are scanned like sequences of their own: the long arrays are (groups * batch, positions, channels),
  // B and C (groups * batch, positions, state), with `channels` those of one group. Everything else ends in all
  // channels, (…, width), except A, (width, state), and its gradient. Under vmap there are several of all these, one after the other: `rows` counts all sequences.
  int64_t rows, groups, batch, positions, length, channels, width, state, ranges;
  const void *u, *delta, *z;  // of one element type, T below
  const float *A, *B, *C, *D, *delta_bias, *initial_state;
  std::vector<float> exponents;  // A / log(2), transposed to (state, width)
  const int32_t* order;  // (groups, length): the position of each step, negative where there is none; null if it counts
  bool shared_u, shared_z;  // all groups read the same
  bool constant_B, constant_C, softplus, reverse;

  int64_t chunks() const { return (length + kChunk - 1) / kChunk; }
  int64_t blocks() const { return (channels + kLanes - 1) / kLanes; }
  int64_t tasks() const { return rows * ranges; }
  int64_t blocks_per_task() const { return (blocks() + ranges - 1) / ranges; }
  bool splat() const { return !constant_B && !constant_C; }

  // Shapes of arrays, without leading dimensions.
  std::vector<int64_t> sequences() const { return {groups * batch, positions, channels}; }
  std::vector<int64_t> matrices() const { return {groups * batch, positions, state}; }
  std::vector<int64_t> states() const { return {batch, state, width}; }
  std::vector<int64_t> starts() const { return {batch, chunks(), state, width}; }
};

// The steps of a chunk, and where each is in a sequence of (positions, channels); negative where it has no position.
struct Chunk {
  int64_t number = 0;
  int count = 0;
  int64_t positions[kChunk], at[kChunk];
};

// A sequence, and a range of its channel blocks.
struct Task {
  const Scan& scan;
  int64_t row, range, first_block, blocks, problem, group, sequence;  // the sequence is that of the batch

  Task(const Scan& scan, int64_t index)
      : scan(scan),
        row(index / scan.ranges),
        range(index % scan.ranges),
        first_block(range * scan.blocks() / scan.ranges),
        blocks((range + 1) * scan.blocks() / scan.ranges - first_block),
        problem(row / (scan.groups * scan.batch)),
        group(row / scan.batch % scan.groups),
        sequence(problem * scan.batch + row % scan.batch) {}

  int64_t Channel(int64_t block) const { return (first_block + block) * kLanes; }
  int Lanes(int64_t block) const {
    return static_cast<int>(std::min<int64_t>(kLanes, scan.channels - Channel(block)));
  }

  // A chunk's steps. Before the first and after the last one comes the same chunk of the next sequence, which is likely
  // to be the next task of this thread.
  Chunk Steps(int64_t number) const {
    Chunk chunk{number};
    const int32_t* order = scan.order ? scan.order + (problem * scan.groups + group) * scan.length : nullptr;
    const bool here = 0 <= number && number < scan.chunks();
    const int64_t first = here ? number * kChunk : number < 0 ? (scan.chunks() - 1) * kChunk : 0;
    const int64_t sequences = here ? 0 : scan.positions * scan.channels;
    for (int64_t step = first; chunk.count < kChunk && step < scan.length; ++step, ++chunk.count) {
      const int64_t counted = scan.reverse ? scan.length - 1 - step : step;
      const int64_t position = order ? order[counted] : counted;
      chunk.positions[chunk.count] = position;
      chunk.at[chunk.count] = position * scan.channels + (position < 0 ? 0 : sequences);
    }
    return chunk;
  }

  // A block of a long array, whose steps are at Chunk::at; null of null.
  template <class T, class Data>
  T* Block(Data* data, int64_t block, bool shared = false) const {
    if (!data) return nullptr;
    return static_cast<T*>(data) + (shared ? sequence : row) * scan.positions * scan.channels + Channel(block);
  }

  // A block's part of row `index` of an array that ends in all channels.
  int64_t At(int64_t index, int64_t block) const {
    return index * scan.width + group * scan.channels + Channel(block);
  }
  int64_t StateAt(int64_t n, int64_t block) const { return At(sequence * scan.state + n, block); }
  int64_t StartAt(int64_t chunk, int64_t n, int64_t block) const {
    return At((sequence * scan.chunks() + chunk) * scan.state + n, block);
  }

  Vec Parameter(const float* values, int64_t block) const {
    return values ? Load(values + At(problem, block), Lanes(block)) : Vec{};
  }

  // [block][state] vectors from and to an array (index, state, width); zeros from null.
  Vec* Gather(const float* from, int64_t index, Arena& arena) const {
    Vec* to = arena.Zeros(blocks * scan.state);
    for (int64_t block = 0; from && block < blocks; ++block)
      for (int64_t n = 0; n < scan.state; ++n)
        to[block * scan.state + n] = Load(from + At(index * scan.state + n, block), Lanes(block));
    return to;
  }
  void Scatter(const Vec* from, float* to, int64_t index) const {
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t n = 0; n < scan.state; ++n)
        Store(to + At(index * scan.state + n, block), from[block * scan.state + n], Lanes(block));
  }

  // To an array (index, width, state), like A.
  void ScatterTransposed(const Vec* from, float* to, int64_t index) const {
    for (int64_t block = 0; block < blocks; ++block)
      for (int lane = 0; lane < Lanes(block); ++lane)
        for (int64_t n = 0; n < scan.state; ++n)
          to[(At(index, block) + lane) * scan.state + n] = from[block * scan.state + n][lane];
  }
};

// B or C of a task, chunk by chunk.
class MatrixReader {
 public:
  MatrixReader(const Task& task, const float* values, bool constant, Arena& arena)
      : state_(task.scan.state), constant_(constant) {
    values_ = values + (constant ? 0 : task.row * task.scan.positions * state_);
    if (task.scan.splat()) return;
    vectors_ = constant ? task.Gather(values, task.problem, arena) : arena.Zeros(kChunk * state_);
  }
  // A matrix that varies in time beside a constant one is spread over the lanes, for both to be vectors.
  void Start(const Chunk& chunk) {
    for (int k = 0; !constant_ && k < chunk.count; ++k) {
      const int64_t from = std::max<int64_t>(0, chunk.positions[k]) * state_;  // where u is zero, any row will do
      at_[k] = vectors_ ? k * state_ * kLanes : from;
      for (int64_t n = 0; vectors_ && n < state_; ++n) vectors_[k * state_ + n] = Splat(values_[from + n]);
    }
  }
  Matrix Get(int64_t block, int64_t first_state) const {
    if (!vectors_) return {values_ + first_state, at_};
    return {reinterpret_cast<const float*>(vectors_ + (constant_ ? block * state_ : 0) + first_state), at_};
  }

 private:
  int64_t state_;
  bool constant_;
  const float* values_;
  Vec* vectors_ = nullptr;
  int64_t at_[kChunk] = {};
};

// Sums of dB or dC of a task: over channels, per position, or over time, per channel, where the matrix is constant.
class MatrixGradient {
 public:
  MatrixGradient(const Task& task, float* result, bool constant, Arena& arena)
      : task_(task), result_(result), constant_(constant) {
    size_ = (constant ? task.blocks : kChunk) * task.scan.state;
    sums_ = arena.Zeros(size_);
  }
  Vec* At(int64_t block, int64_t first_state) const {
    return sums_ + (constant_ ? block * task_.scan.state : 0) + first_state;
  }
  int64_t stride() const { return constant_ ? 0 : task_.scan.state; }
  void EndChunk(const Chunk& chunk) {
    if (constant_) return;
    const Scan& scan = task_.scan;
    float* to = result_ + (task_.row * scan.ranges + task_.range) * scan.positions * scan.state;
    static_assert(kChunk % kLanes == 0);
    for (int64_t i = 0; i < size_ / kLanes; ++i) sums_[i] = LaneSums(sums_ + i * kLanes);
    const float* sums = reinterpret_cast<const float*>(sums_);
    for (int k = 0; k < chunk.count; ++k)
      if (chunk.positions[k] >= 0)
        std::memcpy(to + chunk.positions[k] * scan.state, sums + k * scan.state, scan.state * sizeof(float));
    std::fill_n(sums_, size_, Vec{});
  }
  void EndTask() const {
    if (constant_) task_.Scatter(sums_, result_, task_.sequence);
  }

 private:
  const Task& task_;
  float* result_;
  bool constant_;
  int64_t size_;
  Vec* sums_;
};

template <class T>
Vec LoadStep(const T* from, int64_t at, int lanes) {
  return at < 0 ? Vec{} : Load(from + at, lanes);
}
template <class T>
void StoreStep(T* to, int64_t at, Vec v, int lanes) {
  if (at >= 0) Store(to + at, v, lanes);
}

// Reads a block's inputs for a chunk, for the backward pass also the slopes of softplus and silu. Meanwhile fetches what
// the next chunk needs of them and of `others`: rows are too far apart for the processor to foresee them.
template <class T, bool kBackward>
void Read(const Task& task, const Chunk& chunk, const Chunk& next, int64_t block,
          std::initializer_list<const T*> others, Steps& steps, Gradients* grads = nullptr) {
  const Scan& scan = task.scan;
  const T* u = task.Block<const T>(scan.u, block, scan.shared_u);
  const T* delta = task.Block<const T>(scan.delta, block);
  const T* z = task.Block<const T>(scan.z, block, scan.shared_z);
  const int lanes = task.Lanes(block);
  const int fetched = block * kLanes * sizeof(T) % kCacheLine == 0 ? next.count : 0;
  const Vec bias = task.Parameter(scan.delta_bias, block), D = task.Parameter(scan.D, block);
  for (int k = 0; k < chunk.count; ++k) {
    const int64_t at = chunk.at[k];
    if (k < fetched && next.at[k] >= 0) {
      const auto fetch = [&](const T* stream) {
        if (stream) __builtin_prefetch(stream + next.at[k], 0, 2);
      };
      fetch(u), fetch(delta), fetch(z);
      for (const T* stream : others) fetch(stream);
    }
    const Vec input = LoadStep(u, at, lanes);
    Vec step = LoadStep(delta, at, lanes) + bias;
    if (scan.softplus) {
      const Vec w = Exp(MinusAbs(step));
      if constexpr (kBackward) grads->delta_slope[k] = Sigmoid(step, w);
      step = Softplus(step, w);
    }
    if constexpr (kBackward) steps.u[k] = input;
    steps.delta[k] = step;
    steps.input[k] = step * input;
    steps.y[k] = D * input;
    if (z) {
      const Vec gate = LoadStep(z, at, lanes), sigmoid = Sigmoid(gate, Exp(MinusAbs(gate)));
      if constexpr (kBackward) grads->gate_slope[k] = sigmoid * (1.0f + gate * (1.0f - sigmoid));
      steps.gate[k] = gate * sigmoid;
    }
  }
}

struct ForwardResults {
  void* y;
  float *last_state, *starts;
};

template <class T>
void ForwardTask(const Scan& scan, const ForwardResults& results, int64_t index, Arena arena) {
  const Task task(scan, index);
  const Vec* A = task.Gather(scan.exponents.data(), task.problem, arena);
  Vec* state = task.Gather(scan.initial_state, task.sequence, arena);
  MatrixReader B(task, scan.B, scan.constant_B, arena), C(task, scan.C, scan.constant_C, arena);
  Steps steps;
  for (Chunk chunk = task.Steps(0), next; chunk.number < scan.chunks(); chunk = next) {
    next = task.Steps(chunk.number + 1);
    B.Start(chunk);
    C.Start(chunk);
    for (int64_t block = 0; block < task.blocks; ++block) {
      const int lanes = task.Lanes(block);
      T* y = task.Block<T>(results.y, block);
      Vec* h = state + block * scan.state;
      for (int64_t n = 0; results.starts && n < scan.state; ++n)
        Store(results.starts + task.StartAt(chunk.number, n, block), h[n], lanes);
      Read<T, false>(task, chunk, next, block, {y}, steps);
      ForStates<kMaxStates>(scan.state, [&](auto states, int64_t first) {
        constexpr int kStates = decltype(states)::value;
        const auto forward = scan.splat() ? Forward<kStates, true, false> : Forward<kStates, false, false>;
        forward(chunk.count, steps, B.Get(block, first), C.Get(block, first), A + block * scan.state + first, h + first,
                nullptr);
      });
      for (int k = 0; k < chunk.count; ++k)
        StoreStep(y, chunk.at[k], scan.z ? steps.y[k] * steps.gate[k] : steps.y[k], lanes);
    }
  }
  task.Scatter(state, results.last_state, task.sequence);
}

struct Incoming {
  const void* y;
  const float *last_state, *starts;
};

struct BackwardResults {
  void *u, *delta, *z;
  float *A, *B, *C, *D, *delta_bias, *initial_state;
};

template <class T>
void BackwardTask(const Scan& scan, const Incoming& incoming, const BackwardResults& results, int64_t index,
                  Arena arena) {
  const Task task(scan, index);
  const Vec* A = task.Gather(scan.exponents.data(), task.problem, arena);
  Vec* d_state = task.Gather(incoming.last_state, task.sequence, arena);
  Vec* dA = arena.Zeros(task.blocks * scan.state);
  Vec* dD = arena.Zeros(task.blocks);
  Vec* d_bias = arena.Zeros(task.blocks);
  MatrixReader B(task, scan.B, scan.constant_B, arena), C(task, scan.C, scan.constant_C, arena);
  MatrixGradient dB(task, results.B, scan.constant_B, arena), dC(task, results.C, scan.constant_C, arena);
  Vec* start = arena.Zeros(kMaxStates);
  Kept* kept = reinterpret_cast<Kept*>(arena.Zeros(2 * kChunk * kMaxStates));
  Steps steps;
  Gradients grads;
  for (Chunk chunk = task.Steps(scan.chunks() - 1), next; chunk.number >= 0; chunk = next) {
    next = task.Steps(chunk.number - 1);
    B.Start(chunk);
    C.Start(chunk);
    for (int64_t block = 0; block < task.blocks; ++block) {
      const int lanes = task.Lanes(block);
      const T* dy = task.Block<const T>(incoming.y, block);
      T* du = task.Block<T>(results.u, block);
      T* d_delta = task.Block<T>(results.delta, block);
      T* dz = task.Block<T>(results.z, block);
      const Vec D = task.Parameter(scan.D, block);
      Read<T, true>(task, chunk, next, block, {dy, du, d_delta, dz}, steps, &grads);
      for (int k = 0; k < chunk.count; ++k) {
        grads.y[k] = LoadStep(dy, chunk.at[k], lanes);
        grads.core[k] = scan.z ? grads.y[k] * steps.gate[k] : grads.y[k];
        grads.u[k] = D * grads.core[k];
        grads.delta[k] = Vec{};
      }
      ForStates<kMaxStates>(scan.state, [&](auto states, int64_t first) {
        constexpr int kStates = decltype(states)::value;
        const int64_t at = block * scan.state + first;
        const Matrix b = B.Get(block, first), c = C.Get(block, first);
        for (int n = 0; n < kStates; ++n)
          start[n] = Load(incoming.starts + task.StartAt(chunk.number, first + n, block), lanes);
        const auto again = scan.splat() ? Forward<kStates, true, true> : Forward<kStates, false, true>;
        again(chunk.count, steps, b, c, A + at, start, kept);
        const auto adjoint = scan.splat() ? Adjoint<kStates, true> : Adjoint<kStates, false>;
        adjoint(chunk.count, steps, grads, b, c, A + at, kept, d_state + at, dA + at, dB.At(block, first),
                dB.stride(), dC.At(block, first), dC.stride());
      });
      for (int k = chunk.count - 1; k >= 0; --k) {
        const int64_t at = chunk.at[k];
        const Vec d_step = scan.softplus ? grads.delta[k] * grads.delta_slope[k] : grads.delta[k];
        dD[block] += grads.core[k] * steps.u[k];
        d_bias[block] += d_step;
        StoreStep(du, at, grads.u[k], lanes);
        StoreStep(d_delta, at, d_step, lanes);
        if (dz) StoreStep(dz, at, grads.y[k] * steps.y[k] * grads.gate_slope[k], lanes);
      }
    }
    dB.EndChunk(chunk);
    dC.EndChunk(chunk);
  }
  dB.EndTask();
  dC.EndTask();
  task.Scatter(d_state, results.initial_state, task.sequence);
  task.ScatterTransposed(dA, results.A, task.sequence);
  for (int64_t block = 0; block < task.blocks; ++block) {
    const int64_t at = task.At(task.sequence, block);
    if (results.D) Store(results.D + at, dD[block], task.Lanes(block));
    if (results.delta_bias) Store(results.delta_bias + at, d_bias[block], task.Lanes(block));
  }
}

// Vectors that a task takes from its arena at most.
int64_t ArenaVectors(const Scan& scan) {
  const int64_t blocks = scan.blocks_per_task(), matrix = std::max<int64_t>(blocks, kChunk);
  const int64_t matrices = scan.splat() ? 2 : 4;  // the gradients of B and C, and these where they are spread
  return scan.state * (3 * blocks + matrices * matrix) + 2 * blocks + (2 * kChunk + 1) * kMaxStates;
}

// ---------------------------------------------------------------------------------------------------------------------
// Calls run(task, arena) for every task, with memory to work in that no other task has at the same time.
template <class Run>
ffi::Error ForEachTask(ffi::ThreadPool& pool, const Scan& scan, Run run) {
  const int64_t tasks = scan.tasks(), arena = ArenaVectors(scan) * kLanes;
  const bool small = scan.rows * scan.length * scan.channels * scan.state < (1 << 17);
  const int64_t threads = small ? 1 : std::max<int64_t>(1, std::min(tasks, pool.num_threads()));
  const std::unique_ptr<float, decltype(&std::free)> memory(
      static_cast<float*>(std::aligned_alloc(sizeof(Vec), threads * arena * sizeof(float))), &std::free);
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "selective scan: no memory to work in");
  RunTasks(pool, tasks, threads, [&](int64_t task, int64_t member) { run(task, Arena(memory.get() + member * arena)); });
  return ffi::Error::Success();
}

// ---------------------------------------------------------------------------------------------------------------------
// The door to XLA. Arrays may have further leading dimensions, from vmap. An argument that is absent has no elements.

// The arrays of a call, taken out one by one, with a look at whether each has the type and shape that we rely on.
class Arrays {
 public:
  Arrays(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, size_t arguments, size_t results)
      : args_(args), rets_(rets) {
    if (args.size() != arguments || rets.size() != results || Argument(0).dimensions().size() < 3 ||
        Argument(0).element_count() == 0 || Argument(2).element_count() == 0) {
      Refuse("the number of arrays is wrong, or u or A is empty");
      return;
    }
    const auto u = Argument(0).dimensions();
    lead_.assign(u.begin(), u.end() - 3);
  }
  const std::string& refused() const { return refused_; }

  ffi::AnyBuffer Argument(size_t i) const { return *args_.get<ffi::AnyBuffer>(i); }
  ffi::AnyBuffer Result(size_t i) const { return **rets_.get<ffi::AnyBuffer>(i); }

  void* Take(const char* name, const ffi::AnyBuffer& array, ffi::DataType type, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), lead_.begin(), lead_.end());
    const auto actual = array.dimensions();
    if (array.element_type() != type || !std::equal(shape.begin(), shape.end(), actual.begin(), actual.end()))
      Refuse(std::string("shape or type of ") + name);
    return array.untyped_data();
  }
  float* Floats(const char* name, const ffi::AnyBuffer& array, std::vector<int64_t> shape) {
    return static_cast<float*>(Take(name, array, ffi::DataType::F32, std::move(shape)));
  }
  void Refuse(const std::string& why) {
    if (refused_.empty()) refused_ = "selective scan: " + why;
  }
  float* MaybeFloats(const char* name, const ffi::AnyBuffer& array, std::vector<int64_t> shape) {
    return array.element_count() ? Floats(name, array, std::move(shape)) : nullptr;
  }

 private:
  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& rets_;
  std::vector<int64_t> lead_;
  std::string refused_;
};

// Once for all tasks, several of which may need the same part.
void Transpose(Scan& scan) {
  const int64_t size = scan.width * scan.state, problems = scan.rows / (scan.groups * scan.batch);
  scan.exponents.resize(problems * size);
  for (int64_t problem = 0; problem < problems; ++problem)
    for (int64_t channel = 0; channel < scan.width; ++channel)
      for (int64_t n = 0; n < scan.state; ++n)
        scan.exponents[problem * size + n * scan.width + channel] =
            kLog2e * scan.A[problem * size + channel * scan.state + n];
}

// Whether every group's order visits each position once; otherwise results would be missing, or written by two steps.
bool VisitsAll(const Scan& scan) {
  const int64_t orders = scan.rows / scan.batch;
  std::vector<bool> visited(scan.positions);
  for (int64_t i = 0; i < orders; ++i) {
    visited.assign(scan.positions, false);
    int64_t count = 0;
    for (int64_t step = 0; step < scan.length; ++step) {
      const int32_t position = scan.order[i * scan.length + step];
      if (position < 0) continue;
      if (position >= scan.positions || visited[position]) return false;
      visited[position] = true;
      ++count;
    }
    if (count != scan.positions) return false;
  }
  return true;
}

// u, delta, A, B, C, D, z, delta_bias and the order come first in both calls.
Scan MakeScan(Arrays& arrays, int64_t ranges, bool softplus, bool reverse) {
  const auto get = [&](size_t i) { return arrays.Argument(i); };
  const ffi::AnyBuffer u = get(0), delta = get(1), A = get(2), B = get(3), C = get(4), z = get(6), order = get(8);
  const auto shape = delta.dimensions(), sizes = A.dimensions();
  const size_t rank = shape.size();
  Scan scan{};
  if (rank != u.dimensions().size() || sizes.size() + 1 != rank || sizes[rank - 3] % shape.back()) {
    arrays.Refuse("shape of delta or A");
    return scan;
  }
  scan.state = sizes.back();
  scan.width = sizes[rank - 3];
  scan.channels = shape.back();
  scan.groups = scan.width / scan.channels;
  scan.batch = shape[rank - 3] / scan.groups;
  scan.positions = shape[rank - 2];
  scan.length = order.element_count() ? order.dimensions().back() : scan.positions;
  scan.rows = static_cast<int64_t>(delta.element_count()) / (scan.positions * scan.channels);
  const auto shared = [&](const ffi::AnyBuffer& x) {
    return x.dimensions().size() == rank && x.dimensions()[rank - 3] == scan.batch;
  };
  scan.shared_u = shared(u);
  scan.shared_z = shared(z);
  scan.constant_B = B.dimensions().size() < rank;
  scan.constant_C = C.dimensions().size() < rank;
  scan.ranges = ranges;
  const std::vector<int64_t> matrix{scan.state, scan.width};
  const auto source = [&](bool shared) -> std::vector<int64_t> {
    return {shared ? scan.batch : scan.groups * scan.batch, scan.positions, scan.channels};
  };
  scan.u = arrays.Take("u", u, u.element_type(), source(scan.shared_u));
  scan.delta = arrays.Take("delta", delta, u.element_type(), scan.sequences());
  scan.A = arrays.Floats("A", A, {scan.width, scan.state});
  scan.B = arrays.Floats("B", B, scan.constant_B ? matrix : scan.matrices());
  scan.C = arrays.Floats("C", C, scan.constant_C ? matrix : scan.matrices());
  scan.D = arrays.MaybeFloats("D", get(5), {scan.width});
  scan.z = z.element_count() ? arrays.Take("z", z, u.element_type(), source(scan.shared_z)) : nullptr;
  scan.delta_bias = arrays.MaybeFloats("delta_bias", get(7), {scan.width});
  if (order.element_count()) {
    scan.order = static_cast<const int32_t*>(arrays.Take("order", order, ffi::DataType::S32, {scan.groups, scan.length}));
    if (arrays.refused().empty() && !VisitsAll(scan)) arrays.Refuse("order visits a position twice or never");
  }
  scan.softplus = softplus;
  scan.reverse = reverse;
  if (arrays.refused().empty()) Transpose(scan);
  return scan;
}

// Calls run(an element, task, its memory) for every task, the element being of the type of u, unless something is wrong.
template <class Run>
ffi::Error Perform(ffi::ThreadPool& pool, const Scan& scan, const Arrays& arrays, Run run) {
  if (!arrays.refused().empty()) return ffi::Error::InvalidArgument(arrays.refused());
  const auto with = [&](auto element) {
    return ForEachTask(pool, scan, [&](int64_t task, Arena arena) { run(element, task, arena); });
  };
  switch (arrays.Argument(0).element_type()) {
    case ffi::DataType::F32: return with(float{});
    case ffi::DataType::BF16: return with(Bfloat16{});
    case ffi::DataType::F16: return with(Float16{});
    default: return ffi::Error::InvalidArgument("selective scan: type of u");
  }
}

ffi::Error ForwardCall(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t ranges,
                       bool softplus, bool reverse) {
  Arrays arrays(args, rets, 10, 3);
  if (!arrays.refused().empty()) return ffi::Error::InvalidArgument(arrays.refused());
  Scan scan = MakeScan(arrays, ranges, softplus, reverse);
  scan.initial_state = arrays.MaybeFloats("initial_state", arrays.Argument(9), scan.states());
  ForwardResults results;
  results.y = arrays.Take("y", arrays.Result(0), arrays.Argument(0).element_type(), scan.sequences());
  results.last_state = arrays.Floats("last_state", arrays.Result(1), scan.states());
  results.starts = arrays.MaybeFloats("starts", arrays.Result(2), scan.starts());
  return Perform(pool, scan, arrays, [&](auto element, int64_t task, Arena arena) {
    ForwardTask<decltype(element)>(scan, results, task, arena);
  });
}

ffi::Error BackwardCall(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t ranges,
                        bool softplus, bool reverse) {
  Arrays arrays(args, rets, 12, 9);
  if (!arrays.refused().empty()) return ffi::Error::InvalidArgument(arrays.refused());
  const Scan scan = MakeScan(arrays, ranges, softplus, reverse);
  const auto type = arrays.Argument(0).element_type();
  const std::vector<int64_t> channels{scan.batch, scan.width};
  const std::vector<int64_t> matrices{scan.groups * scan.batch, ranges, scan.positions, scan.state};
  Incoming incoming;
  incoming.y = arrays.Take("dy", arrays.Argument(9), type, scan.sequences());
  incoming.last_state = arrays.Floats("d_last_state", arrays.Argument(10), scan.states());
  incoming.starts = arrays.Floats("starts", arrays.Argument(11), scan.starts());
  BackwardResults results;
  results.u = arrays.Take("du", arrays.Result(0), type, scan.sequences());
  results.delta = arrays.Take("d_delta", arrays.Result(1), type, scan.sequences());
  results.A = arrays.Floats("dA", arrays.Result(2), {scan.batch, scan.width, scan.state});
  results.B = arrays.Floats("dB", arrays.Result(3), scan.constant_B ? scan.states() : matrices);
  results.C = arrays.Floats("dC", arrays.Result(4), scan.constant_C ? scan.states() : matrices);
  results.D = scan.D ? arrays.Floats("dD", arrays.Result(5), channels) : nullptr;
  results.z = scan.z ? arrays.Take("dz", arrays.Result(6), type, scan.sequences()) : nullptr;
  results.delta_bias = scan.delta_bias ? arrays.Floats("d_delta_bias", arrays.Result(7), channels) : nullptr;
  results.initial_state = arrays.Floats("d_initial_state", arrays.Result(8), scan.states());
  return Perform(pool, scan, arrays, [&](auto element, int64_t task, Arena arena) {
    BackwardTask<decltype(element)>(scan, incoming, results, task, arena);
  });
}

const auto Binding = [] {
  auto arguments = ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets();
  return std::move(arguments).Attr<int64_t>("ranges").Attr<bool>("delta_softplus").Attr<bool>("reverse");
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_selective_scan_forward, ForwardCall, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(vimd_selective_scan_backward, BackwardCall, Binding());
