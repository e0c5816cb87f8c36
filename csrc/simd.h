// Building blocks of the inner loops: functions compiled per instruction set, vectors, conversions, exp.
//
// T is the type in memory, A the type of arithmetic: double for double, float for all others.
//
// MULTIVERSION marks a function (not a template: a macro in the operator's file defines one per type) that is compiled
// for AVX-512, for AVX2 with FMA, and for the baseline; the loader selects one at load time, so that one binary runs on
// every machine. SKIPKERNELS_INLINE marks the functions that are inlined into it. MULTIVERSION_256 omits AVX-512: a
// loop bound by main memory is a tenth faster with shorter vectors (measured on Zen 4).
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

// Function multiversioning needs ifunc (glibc) and a compiler that knows these levels (GCC 12, Clang 18). Elsewhere only
// the baseline is compiled: on 64-bit ARM that includes vectors (NEON). Sanitizers need one version only.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && \
    (defined(__clang__) ? __clang_major__ >= 18 : __GNUC__ >= 12)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define MULTIVERSION_256 __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#define MULTIVERSION_256
#endif

// Fused multiply-adds: GCC's default for C++. As an option of Clang they could not be turned off for sgd_momentum.cpp.
#ifdef __clang__
#pragma clang fp contract(fast)
#endif

// Inlined into each version, and so compiled with its instructions.
#define SKIPKERNELS_INLINE [[gnu::always_inline]] inline

namespace skipkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 64 bytes: one register with AVX-512, two with AVX2, four with SSE2. The compiler splits it.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
  static constexpr int64_t width = 64 / sizeof(A);
};
template <class T>
using vector_t = typename Vector<accumulate_t<T>>::type;

template <class To, class From>
SKIPKERNELS_INLINE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// N numbers → N/2: the upper half added to the lower.
template <class A, int N>
struct Numbers {
  typedef A type __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
};
template <class A, int N>
SKIPKERNELS_INLINE typename Numbers<A, N / 2>::type fold(const typename Numbers<A, N>::type& x) {
  typename Numbers<A, N / 2>::type half[2];
  std::memcpy(half, &x, sizeof(x));
  return half[0] + half[1];
}

SKIPKERNELS_INLINE Numbers<float, 4>::type fold_to_four(const Vector<float>::type& x) {
  return fold<float, 8>(fold<float, 16>(x));
}
SKIPKERNELS_INLINE Numbers<double, 4>::type fold_to_four(const Vector<double>::type& x) {
  return fold<double, 8>(x);
}

template <class A>
SKIPKERNELS_INLINE A horizontal_sum(const typename Vector<A>::type& x) {
  const auto pair = fold<A, 4>(fold_to_four(x));
  return pair[0] + pair[1];
}

// out[i] = the sum of x[i], for four vectors: half the instructions of four sums.
template <class A>
SKIPKERNELS_INLINE void horizontal_sums(A* out, const typename Vector<A>::type* x) {
  using Four = typename Numbers<A, 4>::type;
  const Four a = fold_to_four(x[0]), b = fold_to_four(x[1]), c = fold_to_four(x[2]), d = fold_to_four(x[3]);
  const Four ab = Four{a[0], b[0], a[1], b[1]} + Four{a[2], b[2], a[3], b[3]};
  const Four cd = Four{c[0], d[0], c[1], d[1]} + Four{c[2], d[2], c[3], d[3]};
  const Four sums = Four{ab[0], ab[1], cd[0], cd[1]} + Four{ab[2], ab[3], cd[2], cd[3]};
  std::memcpy(out, &sums, sizeof(sums));
}

// exp for arguments up to about 0, as in a softmax. Returns 0 below −87, where fp32 is denormal.
SKIPKERNELS_INLINE float exp_nonpositive(float x) {
  const float rounder = 12582912.0f; // 1.5 · 2²³: adding it rounds to an integer, in the low bits of the sum
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts: n · 0.693359375 is exact
  float p = 1.0f / 5040.0f; // Taylor to r⁷: |r| ≤ ln(2)/2, so the remainder is below 2⁻²⁷
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float power = bits_as<float>((bits_as<uint32_t>(shifted) + 127u) << 23); // 2ⁿ: n + 127 is its exponent field
  return x < -87.0f ? 0.0f : p * power;
}

SKIPKERNELS_INLINE double exp_nonpositive(double x) {
  return std::exp(x);
}

// Conversions on bits. F is float and U uint32_t, or both are vectors of them. No branches: they keep compilers from
// vectorising the loop.
template <class U>
SKIPKERNELS_INLINE U one_if_greater(const U& a, const U& b) { // both below 2³¹
  return (b - a) >> 31;
}
template <class U>
SKIPKERNELS_INLINE U choose(const U& one, const U& a, const U& b) { // a where `one` is 1, b where it is 0
  return b ^ ((a ^ b) & (0u - one));
}

// Rounds to nearest even: the high half of the result is the bfloat16, the low half is arbitrary. Not for a NaN with
// bits in the low half, which computations on bfloat16 numbers do not produce.
template <class U>
SKIPKERNELS_INLINE U round_to_bfloat16(const U& bits) {
  return bits + (0x7fffu + ((bits >> 16) & 1u));
}

template <class F, class U>
SKIPKERNELS_INLINE F from_half_bits(const U& half) {
  const U magnitude = (half & 0x7fffu) << 13, largest_finite = 0u * half + 0x0f7fffffu;
  // Read as fp32, the exponent is 112 too small. The product corrects that, also for denormal numbers; infinity and NaN
  // have the largest exponent in both formats.
  const U bits = bits_as<U>(F(bits_as<F>(magnitude) * 0x1p112f));
  return bits_as<F>(U(bits | (half & 0x8000u) << 16 | one_if_greater(magnitude, largest_finite) * 0x7f800000u));
}

template <class F, class U>
SKIPKERNELS_INLINE U half_bits(const F& x) {
  const U bits = bits_as<U>(x), magnitude = bits & 0x7fffffffu, zero = 0u * bits;
  // Adding 0.5 rounds to a multiple of 2⁻²⁴, the smallest fp16, and leaves that multiple in the low bits.
  const U denormal = bits_as<U>(F(bits_as<F>(magnitude) + 0.5f)) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13; // to the nearest, even
  const U finite = choose(one_if_greater(U(zero + 0x38800000u), magnitude), denormal, normal); // below 2⁻¹⁴
  const U special = 0x7c00u + (one_if_greater(magnitude, U(zero + 0x7f800000u)) << 9); // infinity, or NaN
  const U half = choose(one_if_greater(U(zero + 0x47800000u), magnitude), finite, special); // below 2¹⁶
  return half | ((bits >> 16) & 0x8000u);
}

template <class T>
SKIPKERNELS_INLINE accumulate_t<T> widen(T x) {
  return x;
}
SKIPKERNELS_INLINE float widen(BFloat16 x) {
  return bits_as<float>(uint32_t(x.x) << 16);
}
SKIPKERNELS_INLINE float widen(Half x) {
  return from_half_bits<float>(uint32_t(x.x));
}

// By bits_as: Clang 19 does not emit an inline constructor that only MULTIVERSION functions call.
template <class T>
SKIPKERNELS_INLINE T narrow(accumulate_t<T> x) {
  return T(x);
}
template <>
SKIPKERNELS_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t rounded = round_to_bfloat16(bits_as<uint32_t>(x)) >> 16;
  return bits_as<BFloat16>(uint16_t(x != x ? 0x7fc0u : rounded));
}
template <>
SKIPKERNELS_INLINE Half narrow<Half>(float x) {
  return bits_as<Half>(uint16_t(half_bits<float, uint32_t>(x)));
}

// Two vectors of consecutive columns of a row. For 16-bit types the first holds the even columns and the second the
// odd ones: one or two operations, where keeping the order would take shuffles.
template <class T>
struct Columns {
  using A = accumulate_t<T>;
  using V = typename Vector<A>::type;
  static constexpr int64_t count = 2 * Vector<A>::width;
  V first, second;

  SKIPKERNELS_INLINE Columns operator+(const Columns& other) const {
    return {first + other.first, second + other.second};
  }
  SKIPKERNELS_INLINE Columns operator-(const Columns& other) const {
    return {first - other.first, second - other.second};
  }
  SKIPKERNELS_INLINE Columns operator*(const Columns& other) const {
    return {first * other.first, second * other.second};
  }
  SKIPKERNELS_INLINE Columns operator-(A other) const {
    return {first - other, second - other};
  }
  SKIPKERNELS_INLINE Columns operator*(A other) const {
    return {first * other, second * other};
  }
  SKIPKERNELS_INLINE A sum() const {
    return horizontal_sum<A>(first + second);
  }
};

template <class T>
constexpr bool is_16_bit = sizeof(T) == 2;

// slot: index of column i in a row of A that is stored in the order of Columns<T>. slots: length of that row, a whole
// number of Columns.
template <class T>
SKIPKERNELS_INLINE int64_t slot(int64_t i) {
  constexpr int64_t N = Columns<T>::count;
  return is_16_bit<T> ? i / N * N + i % 2 * (N / 2) + i % N / 2 : i;
}
template <class T>
SKIPKERNELS_INLINE int64_t slots(int64_t W) {
  constexpr int64_t N = Columns<T>::count;
  return (W + N - 1) / N * N;
}
template <class T>
SKIPKERNELS_INLINE Columns<T> load_slots(const accumulate_t<T>* row) {
  using V = typename Columns<T>::V;
  return {*reinterpret_cast<const V*>(row), *reinterpret_cast<const V*>(row + Columns<T>::count / 2)};
}
template <class T>
SKIPKERNELS_INLINE void store_slots(accumulate_t<T>* row, const Columns<T>& x) {
  using V = typename Columns<T>::V;
  *reinterpret_cast<V*>(row) = x.first;
  *reinterpret_cast<V*>(row + Columns<T>::count / 2) = x.second;
}

// load_columns and store_columns: Columns of a row of T in memory of any alignment.
typedef uint32_t Words __attribute__((vector_size(64), aligned(2), may_alias));

#ifdef __aarch64__ // has instructions for fp16 in its base set, which replace eight and twenty operations on bits
SKIPKERNELS_INLINE Vector<float>::type from_half_words(const Words& half) {
  Vector<float>::type out;
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t words = vld1q_u32(reinterpret_cast<const uint32_t*>(&half) + 4 * i);
    vst1q_f32(reinterpret_cast<float*>(&out) + 4 * i, vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(words))));
  }
  return out;
}
SKIPKERNELS_INLINE Words half_words(const Vector<float>::type& x) {
  Words half;
  for (int i = 0; i < 4; ++i) {
    const float32x4_t numbers = vld1q_f32(reinterpret_cast<const float*>(&x) + 4 * i);
    vst1q_u32(reinterpret_cast<uint32_t*>(&half) + 4 * i, vmovl_u16(vreinterpret_u16_f16(vcvt_f16_f32(numbers))));
  }
  return half;
}
#else
SKIPKERNELS_INLINE Vector<float>::type from_half_words(const Words& half) {
  return from_half_bits<Vector<float>::type>(half);
}
SKIPKERNELS_INLINE Words half_words(const Vector<float>::type& x) {
  return half_bits<Vector<float>::type, Words>(x);
}
#endif

template <class T>
SKIPKERNELS_INLINE Columns<T> load_columns(const T* x) {
  using V = typename Columns<T>::V;
  if constexpr (!is_16_bit<T>) {
    return load_slots<T>(x);
  } else {
    const Words words = *reinterpret_cast<const Words*>(x);
    if constexpr (std::is_same_v<T, BFloat16>)
      return {bits_as<V>(Words(words << 16)), bits_as<V>(Words(words & 0xffff0000u))};
    else
      return {from_half_words(words & 0xffffu), from_half_words(words >> 16)};
  }
}

// Stores x, and sets x to the stored values, which are rounded to T.
template <class T>
SKIPKERNELS_INLINE void store_columns(T* out, Columns<T>& x) {
  using V = typename Columns<T>::V;
  if constexpr (!is_16_bit<T>) {
    store_slots<T>(out, x);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words even = round_to_bfloat16(bits_as<Words>(x.first)) & 0xffff0000u;
    const Words odd = round_to_bfloat16(bits_as<Words>(x.second)) & 0xffff0000u;
    *reinterpret_cast<Words*>(out) = even >> 16 | odd;
    x = {bits_as<V>(even), bits_as<V>(odd)};
  } else {
    const Words even = half_words(x.first), odd = half_words(x.second);
    *reinterpret_cast<Words*>(out) = even | odd << 16;
    x = {from_half_words(even), from_half_words(odd)};
  }
}

// Calls f(i, n) for all Columns of a row. i is the first column; n is Whole, or the number of columns at the end of the
// row if they are fewer. The functions below take n: columns beyond the row are read as zero and not written.
struct Whole {};

template <class T, class F>
SKIPKERNELS_INLINE void for_columns(int64_t W, const F& f) {
  int64_t i = 0;
  for (; i + Columns<T>::count <= W; i += Columns<T>::count)
    f(i, Whole());
  if (i < W)
    f(i, W - i);
}
// Marks the lambda passed to for_columns, which must be inlined as well.
#define SKIPKERNELS_INLINE_LAMBDA __attribute__((always_inline))

template <class T>
SKIPKERNELS_INLINE Columns<T> load_columns(const T* x, Whole) {
  return load_columns(x);
}
template <class T>
SKIPKERNELS_INLINE Columns<T> load_columns(const T* x, int64_t n) {
  T row[Columns<T>::count] = {};
  std::memcpy(row, x, n * sizeof(T));
  return load_columns(row);
}
template <class T>
SKIPKERNELS_INLINE void store_columns(T* out, Columns<T>& x, Whole) {
  store_columns(out, x);
}
template <class T>
SKIPKERNELS_INLINE void store_columns(T* out, Columns<T>& x, int64_t n) {
  T row[Columns<T>::count];
  store_columns(row, x);
  std::memcpy(out, row, n * sizeof(T));
}
// Returns x with zeros in the columns beyond the row.
template <class T>
SKIPKERNELS_INLINE Columns<T> only(const Columns<T>& x, Whole) {
  return x;
}
template <class T>
SKIPKERNELS_INLINE Columns<T> only(const Columns<T>& x, int64_t n) {
  accumulate_t<T> row[Columns<T>::count];
  store_slots(row, x);
  for (int64_t i = n; i < Columns<T>::count; ++i)
    row[slot<T>(i)] = 0;
  return load_slots<T>(row);
}

} // namespace skipkernels
