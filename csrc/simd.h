// What the inner loops are written with: a function compiled for each instruction set, vectors, conversions, exp.
//
// T is the type of numbers in memory, A the type that arithmetic is done in: double for double, float for all else.
// MULTIVERSION marks a function of its own (no template: the macro of an operator's file instantiates one for each
// type), which is compiled for AVX-512, for AVX2 with FMA and for the plain machine; the loader picks one when the
// library is loaded. So one binary runs anywhere and is fast where it can be. BODY marks what is inlined into it.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// Function multiversioning needs ifunc, which glibc has. Elsewhere the compiler's default target is all there is: on
// 64-bit ARM that has its vectors (NEON) in the base instruction set.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef MULTIVERSION
#define MULTIVERSION
#endif

// A body is inlined into each version, and so is compiled with the instructions of that version.
#define BODY [[gnu::always_inline]] inline

namespace skipkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// 64 bytes: one register with AVX-512, two with AVX2, four else. The compiler splits it as needed.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(64), aligned(alignof(A)), may_alias));
  static constexpr int64_t width = 64 / sizeof(A);
};

// N numbers → N/2: the upper half added to the lower.
template <class A, int N>
struct Numbers {
  typedef A type __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
};
template <class A, int N>
BODY typename Numbers<A, N / 2>::type fold(const typename Numbers<A, N>::type& x) {
  typename Numbers<A, N / 2>::type half[2];
  std::memcpy(half, &x, sizeof(x));
  return half[0] + half[1];
}

BODY Numbers<float, 4>::type fold_to_four(const Vector<float>::type& x) {
  return fold<float, 8>(fold<float, 16>(x));
}
BODY Numbers<double, 4>::type fold_to_four(const Vector<double>::type& x) {
  return fold<double, 8>(x);
}

template <class A>
BODY A horizontal_sum(const typename Vector<A>::type& x) {
  const auto pair = fold<A, 4>(fold_to_four(x));
  return pair[0] + pair[1];
}

// out[i] = the sum of x[i], for four vectors: half the instructions of four sums.
template <class A>
BODY void horizontal_sums(A* out, const typename Vector<A>::type* x) {
  using Four = typename Numbers<A, 4>::type;
  const Four a = fold_to_four(x[0]), b = fold_to_four(x[1]), c = fold_to_four(x[2]), d = fold_to_four(x[3]);
  const Four ab = Four{a[0], b[0], a[1], b[1]} + Four{a[2], b[2], a[3], b[3]};
  const Four cd = Four{c[0], d[0], c[1], d[1]} + Four{c[2], d[2], c[3], d[3]};
  const Four sums = Four{ab[0], ab[1], cd[0], cd[1]} + Four{ab[2], ab[3], cd[2], cd[3]};
  std::memcpy(out, &sums, sizeof(sums));
}

// exp for arguments up to about 0, which is all a softmax needs: 0 below −87, where fp32 would turn denormal.
BODY float exp_nonpositive(float x) {
  const float rounder = 12582912.0f; // 1.5 · 2²³: adding it rounds to an integer, in the low bits of the sum
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; // ln 2 in two parts: n · 0.693359375 is exact
  float p = 1.0f / 5040.0f; // Taylor to r⁷: |r| ≤ ln(2)/2, so what is left out is below 2⁻²⁷
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23; // the exponent field of 2ⁿ
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

BODY double exp_nonpositive(double x) {
  return std::exp(x);
}

template <class T>
BODY accumulate_t<T> widen(T x) {
  return x;
}
BODY float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
BODY T narrow(accumulate_t<T> x) {
  return T(x);
}
template <>
BODY BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(uint16_t(x != x ? 0x7fc0u : nearest_even), BFloat16::from_bits());
}

} // namespace skipkernels
