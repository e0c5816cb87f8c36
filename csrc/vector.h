// The inner loops: functions from rows of numbers to rows of numbers, without tensors, threads or allocations.
#pragma once

#include "simd.h"

namespace skipkernels {

// As torch.nn.functional.normalize: a row is divided by max(length, eps). The same number is in reference.py.
constexpr double UNIT_NORM_EPS = 1e-12;

#define SKIPKERNELS_DECLARE_FEATURE_LOOPS(T, A)                                                \
  /* unit = x / max(|x|, eps); returns |x|. */                                                 \
  A load_unit_row(A* unit, const T* x, int64_t D);                                             \
  /* unit = x / max(norm, eps). */                                                             \
  void load_unit_row(A* unit, const T* x, A norm, int64_t D);                                  \
  /* out = x. */                                                                               \
  void load_row(A* out, const T* x, int64_t D);                                                \
  /* d_x from d_unit, the gradient of the unit row up to the factor scale. May be in place. */ \
  void store_unit_row_gradient(T* d_x, const A* d_unit, A scale, const T* x, A norm, int64_t D)

SKIPKERNELS_DECLARE_FEATURE_LOOPS(float, float);
SKIPKERNELS_DECLARE_FEATURE_LOOPS(double, double);
SKIPKERNELS_DECLARE_FEATURE_LOOPS(BFloat16, float);
SKIPKERNELS_DECLARE_FEATURE_LOOPS(Half, float);
#undef SKIPKERNELS_DECLARE_FEATURE_LOOPS

// out = x, to or from a type of arithmetic.
#define SKIPKERNELS_FOR_CONVERSIONS(F)                                                    \
  F(float, BFloat16) F(float, Half) F(float, double) F(BFloat16, float) F(Half, float)    \
  F(BFloat16, double) F(Half, double) F(double, float) F(double, BFloat16) F(double, Half)
#define SKIPKERNELS_DECLARE_CONVERSION(Out, In) void convert_row(Out* out, const In* x, int64_t n);
SKIPKERNELS_FOR_CONVERSIONS(SKIPKERNELS_DECLARE_CONVERSION)
#undef SKIPKERNELS_DECLARE_CONVERSION

// p_k = exp(scale · (cosine_k − top) − log_sum), where top is the cosine with the largest logit and log_sum the
// logarithm of Σ_k exp(scale · (cosine_k − top)). The difference of the cosines is taken before it is scaled: that is
// exact where they are close, while logits of 100 are only known to 4e-6 in fp32.
template <class A>
struct Softmax {
  A scale, top, log_sum;
};

#define SKIPKERNELS_DECLARE_LOOPS(A)                                                                         \
  /* Small matrix products (large ones: tensor.h). a and b are contiguous unless strides are given. */       \
  /* out[m, n] = a[m, d] · b[n, d]ᵀ */                                                                       \
  void small_matmul_nt(A* out, int64_t stride_out, const A* a, const A* b, int64_t m, int64_t n, int64_t d); \
  /* out[m, d] += a[m, n] · b[n, d] */                                                                       \
  void small_matmul_add(                                                                                     \
      A* out, int64_t stride_out, const A* a, int64_t stride_a_m, int64_t stride_a_n, const A* b, int64_t m, \
      int64_t n, int64_t d);                                                                                 \
  /* out += x */                                                                                             \
  void add(A* out, const A* x, int64_t n);                                                                   \
  /* out = x · factor */                                                                                     \
  void multiply(A* out, const A* x, A factor, int64_t n);                                                    \
  /* out = max(out, x), NaN if either is. */                                                                 \
  void maximum(A* out, const A* x, int64_t n);                                                               \
  /* Σ x · y, summed in fp64: for sums with cancelling terms. */                                            \
  double dot(const A* x, const A* y, int64_t n);                                                             \
  /* Updates the running top and sum with n cosines; sum is 0 before the first call. See Softmax. */         \
  void online_softmax(A* top, A* sum, const A* cosine, A scale, int64_t n);                                  \
  /* cosine → d_logit = factor · p − spread · weight, in place; returns Σ d_logit · cosine. */               \
  /* If weight is null, there is no second term. */                                                          \
  A softmax_gradient(A* cosine, const Softmax<A>& softmax, A factor, A spread, const A* weight, int64_t n)

SKIPKERNELS_DECLARE_LOOPS(float);
SKIPKERNELS_DECLARE_LOOPS(double);
#undef SKIPKERNELS_DECLARE_LOOPS

// out += x
void add(float* out, const BFloat16* x, int64_t n);

} // namespace skipkernels
