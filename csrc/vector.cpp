// The inner loops of rows, cosines and softmax, written once for every type. See vector.h.
#include "vector.h"

#include <algorithm>
#include <cmath>

namespace skipkernels {
namespace {

// I × J dot products: I · J independent chains of FMAs, and each loaded value is used several times.
template <class A, int I, int J>
SKIPKERNELS_INLINE void dot_block(A* out, int64_t stride_out, const A* a, const A* b, int64_t d) {
  using V = typename Vector<A>::type;
  constexpr int64_t W = Vector<A>::width;
  V sum[I][J] = {};
  int64_t t = 0;
  for (; t + W <= d; t += W)
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j)
        sum[i][j] += *reinterpret_cast<const V*>(a + i * d + t) * *reinterpret_cast<const V*>(b + j * d + t);
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) {
      A total = horizontal_sum<A>(sum[i][j]);
      for (int64_t rest = t; rest < d; ++rest)
        total += a[i * d + rest] * b[j * d + rest];
      out[i * stride_out + j] = total;
    }
}

template <class T, class A>
SKIPKERNELS_INLINE void load_scaled(A* out, const T* x, A factor, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d)
    out[d] = widen(x[d]) * factor;
}

template <class T, class A>
SKIPKERNELS_INLINE A length(const T* x, int64_t D) {
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < D; ++d)
    squares += widen(x[d]) * widen(x[d]);
  return std::sqrt(squares);
}

template <class T, class A>
SKIPKERNELS_INLINE void store_unit_row_gradient_body(T* d_x, const A* d_unit, A scale, const T* x, A norm, int64_t D) {
  // d_x = (d_unit − x · ⟨x, d_unit⟩/|x|²)/|x|; a row shorter than eps was divided by a constant: d_x = d_unit/eps.
  const A inverse = 1 / std::max(norm, A(UNIT_NORM_EPS));
  A along = 0;
  if (norm >= A(UNIT_NORM_EPS)) {
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < D; ++d)
      along += d_unit[d] * (widen(x[d]) * inverse);
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d)
    d_x[d] = narrow<T>((d_unit[d] - widen(x[d]) * inverse * along) * (scale * inverse));
}

template <class Out, class In>
SKIPKERNELS_INLINE void convert_row_body(Out* out, const In* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] = narrow<Out>(accumulate_t<Out>(widen(x[i])));
}

// J rows of b against all rows of a: the rows of b, which may be many, are read once.
template <class A, int J>
SKIPKERNELS_INLINE void dot_columns(A* out, int64_t stride_out, const A* a, const A* b, int64_t m, int64_t d) {
  int64_t i = 0;
  for (; i + 2 <= m; i += 2)
    dot_block<A, 2, J>(out + i * stride_out, stride_out, a + i * d, b, d);
  if (i < m)
    dot_block<A, 1, J>(out + i * stride_out, stride_out, a + i * d, b, d);
}

template <class A>
SKIPKERNELS_INLINE void small_matmul_nt_body(
    A* out, int64_t stride_out, const A* a, const A* b, int64_t m, int64_t n, int64_t d) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    dot_columns<A, 4>(out + j, stride_out, a, b + j * d, m, d);
  for (; j < n; ++j)
    dot_columns<A, 1>(out + j, stride_out, a, b + j * d, m, d);
}

// out[d] += Σ_i factor[i · stride] · x[i, d], four rows at a time: out is read and written a quarter as often.
template <class A>
SKIPKERNELS_INLINE void add_scaled_rows(A* out, const A* factor, int64_t stride, const A* x, int64_t rows, int64_t D) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    const A *x0 = x + i * D, *x1 = x0 + D, *x2 = x1 + D, *x3 = x2 + D;
    const A f0 = factor[i * stride], f1 = factor[(i + 1) * stride];
    const A f2 = factor[(i + 2) * stride], f3 = factor[(i + 3) * stride];
#pragma omp simd
    for (int64_t d = 0; d < D; ++d)
      out[d] += (f0 * x0[d] + f1 * x1[d]) + (f2 * x2[d] + f3 * x3[d]);
  }
  for (; i < rows; ++i) {
    const A* x0 = x + i * D;
    const A f0 = factor[i * stride];
#pragma omp simd
    for (int64_t d = 0; d < D; ++d)
      out[d] += f0 * x0[d];
  }
}

template <class A>
SKIPKERNELS_INLINE double dot_body(const A* x, const A* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i)
    sum += double(x[i]) * double(y[i]);
  return sum;
}

// The x with the largest scale · x. One maximum per vector lane: not all compilers vectorise a reduction by maximum.
template <class A>
SKIPKERNELS_INLINE A top_of(A start, const A* x, A scale, int64_t n) {
  constexpr int64_t W = Vector<A>::width;
  A lanes[W];
  std::fill(lanes, lanes + W, start);
  int64_t k = 0;
  for (; k + W <= n; k += W)
    for (int64_t i = 0; i < W; ++i)
      lanes[i] = scale * x[k + i] > scale * lanes[i] ? x[k + i] : lanes[i];
  for (; k < n; ++k)
    lanes[0] = scale * x[k] > scale * lanes[0] ? x[k] : lanes[0];
  for (int64_t i = 1; i < W; ++i)
    lanes[0] = scale * lanes[i] > scale * lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

template <class A>
SKIPKERNELS_INLINE void online_softmax_body(A* top, A* sum, const A* cosine, A scale, int64_t n) {
  const bool first = *sum == 0;
  const A higher = top_of(first ? cosine[0] : *top, cosine, scale, n);
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < n; ++k)
    total += exp_nonpositive(scale * (cosine[k] - higher));
  *sum = first ? total : *sum * exp_nonpositive(scale * (*top - higher)) + total;
  *top = higher;
}

template <class A>
SKIPKERNELS_INLINE A
softmax_gradient_body(A* cosine, const Softmax<A>& softmax, A factor, A spread, const A* weight, int64_t n) {
  const A scale = softmax.scale, top = softmax.top, log_sum = softmax.log_sum;
  A along = 0;
  if (weight != nullptr) {
#pragma omp simd reduction(+ : along)
    for (int64_t k = 0; k < n; ++k) {
      const A d_logit = factor * exp_nonpositive(scale * (cosine[k] - top) - log_sum) - spread * weight[k];
      along += d_logit * cosine[k];
      cosine[k] = d_logit;
    }
  } else {
#pragma omp simd reduction(+ : along)
    for (int64_t k = 0; k < n; ++k) {
      const A d_logit = factor * exp_nonpositive(scale * (cosine[k] - top) - log_sum);
      along += d_logit * cosine[k];
      cosine[k] = d_logit;
    }
  }
  return along;
}

} // namespace

#define DEFINE_FEATURE_LOOPS(T, A)                                                                             \
  MULTIVERSION A load_unit_row(A* unit, const T* x, int64_t D) {                                               \
    const A norm = length<T, A>(x, D);                                                                         \
    load_scaled<T, A>(unit, x, 1 / std::max(norm, A(UNIT_NORM_EPS)), D);                                       \
    return norm;                                                                                               \
  }                                                                                                            \
  MULTIVERSION void load_unit_row(A* unit, const T* x, A norm, int64_t D) {                                    \
    load_scaled<T, A>(unit, x, 1 / std::max(norm, A(UNIT_NORM_EPS)), D);                                       \
  }                                                                                                            \
  MULTIVERSION void load_row(A* out, const T* x, int64_t D) {                                                  \
    load_scaled<T, A>(out, x, A(1), D);                                                                        \
  }                                                                                                            \
  MULTIVERSION void store_unit_row_gradient(T* d_x, const A* d_unit, A scale, const T* x, A norm, int64_t D) { \
    store_unit_row_gradient_body<T, A>(d_x, d_unit, scale, x, norm, D);                                        \
  }

DEFINE_FEATURE_LOOPS(float, float)
DEFINE_FEATURE_LOOPS(double, double)
DEFINE_FEATURE_LOOPS(BFloat16, float)
DEFINE_FEATURE_LOOPS(Half, float)

#define DEFINE_CONVERSION(Out, In)                                \
  MULTIVERSION void convert_row(Out* out, const In* x, int64_t n) { \
    convert_row_body(out, x, n);                                    \
  }

SKIPKERNELS_FOR_CONVERSIONS(DEFINE_CONVERSION)

#define DEFINE_LOOPS(A)                                                                                         \
  MULTIVERSION void small_matmul_nt(                                                                            \
      A* out, int64_t stride_out, const A* a, const A* b, int64_t m, int64_t n, int64_t d) {                    \
    small_matmul_nt_body<A>(out, stride_out, a, b, m, n, d);                                                    \
  }                                                                                                             \
  MULTIVERSION void small_matmul_add(                                                                           \
      A* out, int64_t stride_out, const A* a, int64_t stride_a_m, int64_t stride_a_n, const A* b, int64_t m,    \
      int64_t n, int64_t d) {                                                                                   \
    for (int64_t i = 0; i < m; ++i)                                                                             \
      add_scaled_rows<A>(out + i * stride_out, a + i * stride_a_m, stride_a_n, b, n, d);                        \
  }                                                                                                             \
  MULTIVERSION void add(A* out, const A* x, int64_t n) {                                                        \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) out[i] += x[i];                                         \
  }                                                                                                             \
  MULTIVERSION void multiply(A* out, const A* x, A factor, int64_t n) {                                          \
    load_scaled<A, A>(out, x, factor, n);                                                                       \
  }                                                                                                             \
  MULTIVERSION void maximum(A* out, const A* x, int64_t n) {                                                    \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) out[i] = x[i] > out[i] || x[i] != x[i] ? x[i] : out[i]; \
  }                                                                                                             \
  MULTIVERSION double dot(const A* x, const A* y, int64_t n) {                                                  \
    return dot_body<A>(x, y, n);                                                                                \
  }                                                                                                             \
  MULTIVERSION void online_softmax(A* top, A* sum, const A* cosine, A scale, int64_t n) {                       \
    online_softmax_body<A>(top, sum, cosine, scale, n);                                                         \
  }                                                                                                             \
  MULTIVERSION A softmax_gradient(                                                                              \
      A* cosine, const Softmax<A>& softmax, A factor, A spread, const A* weight, int64_t n) {                   \
    return softmax_gradient_body<A>(cosine, softmax, factor, spread, weight, n);                                \
  }

DEFINE_LOOPS(float)
DEFINE_LOOPS(double)

MULTIVERSION void add(float* out, const BFloat16* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    out[i] += widen(x[i]);
}

} // namespace skipkernels
