// Shared by the attention operators: tokens in tensors, tiles of tokens in scratch, and products of tiles.
//
// A tile is n rows of E numbers, widened to the type of arithmetic and padded with zeros to `width`, a whole number of
// vectors, so that inner loops have no remainder. Everything here is inlined into the MULTIVERSION functions.
#pragma once

#include <limits>

#include "tensor.h"

namespace skipkernels {

// [tokens, H, E] in memory; the E numbers of a token's head are contiguous.
template <class T>
struct Tokens {
  T* data;
  int64_t stride_token, stride_head;

  SKIPKERNELS_INLINE T* at(int64_t token, int64_t head) const {
    return data + token * stride_token + head * stride_head;
  }
};

// Tokens of the last three dimensions, at index 0 of the others.
template <class T>
Tokens<const T> tokens_of(const Tensor& tokens) {
  return {tokens.const_data_ptr<T>(), tokens.stride(tokens.dim() - 3), tokens.stride(tokens.dim() - 2)};
}
template <class T>
Tokens<T> mutable_tokens_of(Tensor& tokens) {
  return {tokens.mutable_data_ptr<T>(), tokens.stride(tokens.dim() - 3), tokens.stride(tokens.dim() - 2)};
}

template <class T>
Tokens<T> tokens_if(bool need, Tensor& tokens) {
  return need ? mutable_tokens_of<T>(tokens) : Tokens<T>{};
}

template <class A>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + Vector<A>::width - 1) / Vector<A>::width * Vector<A>::width;
}

template <class A>
Scratch<A> zeros(int64_t n) {
  Scratch<A> numbers = scratch<A>(n);
  std::fill(numbers.get(), numbers.get() + n, A(0));
  return numbers;
}

template <class A>
using Vec = typename Vector<A>::type;

template <class A>
SKIPKERNELS_INLINE const Vec<A>& vec(const A* x) {
  return *reinterpret_cast<const Vec<A>*>(x);
}
template <class A>
SKIPKERNELS_INLINE Vec<A>& vec(A* x) {
  return *reinterpret_cast<Vec<A>*>(x);
}

// One head of `rows` tokens → a tile. The padding stays zero.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void load_rows(
    A* tile, int64_t width, const Tokens<const T>& x, int64_t token, int64_t head, int64_t rows, int64_t E) {
  constexpr int64_t W = Vector<A>::width;
  for (int64_t i = 0; i < rows; ++i) {
    A* out = tile + i * width;
    const T* in = x.at(token + i, head);
    int64_t e = 0;
    for (; e + W <= E; e += W)
      for (int64_t lane = 0; lane < W; ++lane)
        out[e + lane] = widen(in[e + lane]);
    for (; e < E; ++e)
      out[e] = widen(in[e]);
  }
}

// Heads h0 to h1 of one token → a tile.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void load_heads(
    A* tile, int64_t width, const Tokens<const T>& x, int64_t token, int64_t h0, int64_t h1, int64_t E) {
  for (int64_t h = h0; h < h1; ++h)
    load_rows(tile + (h - h0) * width, width, x, token, h, 1, E);
}

template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void store_rows(
    const Tokens<T>& x, int64_t token, int64_t head, const A* tile, int64_t width, A factor, int64_t rows, int64_t E) {
  constexpr int64_t W = Vector<A>::width;
  for (int64_t i = 0; i < rows; ++i) {
    T* out = x.at(token + i, head);
    const A* in = tile + i * width;
    int64_t e = 0;
    for (; e + W <= E; e += W)
      for (int64_t lane = 0; lane < W; ++lane)
        out[e + lane] = narrow<T>(factor * in[e + lane]);
    for (; e < E; ++e)
      out[e] = narrow<T>(factor * in[e]);
  }
}

// Rows of whole vectors, in a tile or in a tensor.
template <class A>
struct TileRows {
  const A* data;
  int64_t stride;

  SKIPKERNELS_INLINE TileRows from(int64_t row) const {
    return {data + row * stride, stride};
  }
};

// out[i, j] = ⟨a_i, b_j⟩ for I × J pairs of rows.
template <class A, int I, int J>
SKIPKERNELS_INLINE void multiply_nt_block(A* out, int64_t stride_out, const A* a, const TileRows<A>& b, int64_t width) {
  Vec<A> sum[I][J] = {};
  for (int64_t e = 0; e < width; e += Vector<A>::width)
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j)
        sum[i][j] += vec(a + i * width + e) * vec(b.data + j * b.stride + e);
  for (int i = 0; i < I; ++i)
    if constexpr (J == 4)
      horizontal_sums<A>(out + i * stride_out, sum[i]);
    else
      for (int j = 0; j < J; ++j)
        out[i * stride_out + j] = horizontal_sum<A>(sum[i][j]);
}

template <class A, int J>
SKIPKERNELS_INLINE void multiply_nt_columns(
    A* out, int64_t stride_out, const A* a, const TileRows<A>& b, int64_t m, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_nt_block<A, 4, J>(out + i * stride_out, stride_out, a + i * width, b, width);
  for (; i < m; ++i)
    multiply_nt_block<A, 1, J>(out + i * stride_out, stride_out, a + i * width, b, width);
}

// out[m, n] = a[m, width] · b[n, width]ᵀ; fastest where n is a multiple of four.
template <class A>
SKIPKERNELS_INLINE void multiply_nt(
    A* out, int64_t stride_out, const A* a, const TileRows<A>& b, int64_t m, int64_t n, int64_t width) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4)
    multiply_nt_columns<A, 4>(out + j, stride_out, a, b.from(j), m, width);
  for (; j < n; ++j)
    multiply_nt_columns<A, 1>(out + j, stride_out, a, b.from(j), m, width);
}

// A matrix in a product, with any strides, so that it may be transposed.
template <class A>
struct Factor {
  const A* data;
  int64_t stride_row, stride_column;

  SKIPKERNELS_INLINE Factor from(int64_t row) const {
    return {data + row * stride_row, stride_row, stride_column};
  }
};

// I rows and J vectors of columns of the product below, in registers.
template <class A, int I, int J, bool ADD>
SKIPKERNELS_INLINE void multiply_block(
    A* out, const Factor<A>& factor, const TileRows<A>& b, int64_t n, int64_t width) {
  constexpr int64_t W = Vector<A>::width;
  Vec<A> sum[I][J] = {};
  for (int64_t k = 0; k < n; ++k)
    for (int i = 0; i < I; ++i)
      for (int j = 0; j < J; ++j)
        sum[i][j] += factor.data[i * factor.stride_row + k * factor.stride_column] * vec(b.data + k * b.stride + j * W);
  // The products are summed before they are added to out, so that a gradient summed over classes rounds once per class.
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) {
      Vec<A>& total = vec(out + i * width + j * W);
      total = ADD ? total + sum[i][j] : sum[i][j];
    }
}

template <class A, int I, bool ADD>
SKIPKERNELS_INLINE void multiply_rows(A* out, const Factor<A>& factor, const TileRows<A>& b, int64_t n, int64_t width) {
  constexpr int64_t W = Vector<A>::width;
  constexpr int J = I == 1 ? 4 : 2; // at least four independent sums hide the latency of a multiply-add
  int64_t e = 0;
  for (; e + J * W <= width; e += J * W)
    multiply_block<A, I, J, ADD>(out + e, factor, {b.data + e, b.stride}, n, width);
  for (; e < width; e += W)
    multiply_block<A, I, 1, ADD>(out + e, factor, {b.data + e, b.stride}, n, width);
}

// out[m, width] (+)= factor[m, n] · b[n, width]
template <bool ADD, class A>
SKIPKERNELS_INLINE void multiply(
    A* out, const Factor<A>& factor, const TileRows<A>& b, int64_t m, int64_t n, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4)
    multiply_rows<A, 4, ADD>(out + i * width, factor.from(i), b, n, width);
  for (; i < m; ++i)
    multiply_rows<A, 1, ADD>(out + i * width, factor.from(i), b, n, width);
}

template <class A>
SKIPKERNELS_INLINE A highest(const A* x, int64_t end) {
  constexpr int64_t W = Vector<A>::width;
  Vec<A> tops = vec(x);
  for (int64_t j = W; j < end; j += W)
    tops = vec(x + j) > tops ? vec(x + j) : tops;
  A top[W];
  std::memcpy(top, &tops, sizeof(top));
  for (int64_t half = W / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      top[i] = top[i + half] > top[i] ? top[i + half] : top[i];
  return top[0];
}

// x_j → exp(x_j − top) for j < n, 0 from there to `end`, a whole number of vectors; returns the sum.
template <class A>
SKIPKERNELS_INLINE A exp_row(A* x, A top, int64_t n, int64_t end) {
  constexpr int64_t W = Vector<A>::width;
  Vec<A> sum = {};
  for (int64_t j = 0; j < end; j += W) {
    for (int64_t i = 0; i < W; ++i)
      x[j + i] = int32_t(j + i) < int32_t(n) ? exp_nonpositive(x[j + i] - top) : A(0);
    sum += vec(x + j);
  }
  return horizontal_sum<A>(sum);
}

// x_j → weight_j = exp(scale · x_j − lse) for j < n, 0 from there to `end`, a whole number of vectors. Returns lse.
// Backward calls this too, instead of reading lse: weights normalised by a rounded lse do not sum to 1, and where one
// key has nearly all the weight, that error exceeds the gradient.
template <class A>
SKIPKERNELS_INLINE double softmax_row(A* x, A scale, int64_t n, int64_t end) {
  constexpr int64_t W = Vector<A>::width;
  for (int64_t j = 0; j < end; ++j)
    x[j] = int32_t(j) < int32_t(n) ? scale * x[j] : -std::numeric_limits<A>::infinity();
  const A top = highest(x, end), sum = exp_row(x, top, n, end);
  for (int64_t j = 0; j < end; j += W)
    vec(x + j) *= 1 / sum;
  return double(top) + double(std::log(sum));
}

// d_weight_j → d_score_j = weight_j (d_weight_j − Σ_j weight_j d_weight_j), in place, for j < n; 0 from there to `end`.
template <class A>
SKIPKERNELS_INLINE void score_gradient_row(A* d_weight, const A* weight, int64_t n, int64_t end) {
  constexpr int64_t W = Vector<A>::width;
  Vec<A> sum = {};
  for (int64_t j = 0; j < end; j += W) {
    for (int64_t i = 0; i < W; ++i)
      d_weight[j + i] = int32_t(j + i) < int32_t(n) ? d_weight[j + i] : A(0);
    sum += vec(weight + j) * vec(d_weight + j);
  }
  const A mean = horizontal_sum<A>(sum);
  Vec<A> left = {}; // the weighted mean of the differences, which is the rounding error of `mean`
  for (int64_t j = 0; j < end; j += W) {
    vec(d_weight + j) -= mean;
    left += vec(weight + j) * vec(d_weight + j);
  }
  const A correction = horizontal_sum<A>(left);
  for (int64_t j = 0; j < end; j += W)
    vec(d_weight + j) = vec(weight + j) * (vec(d_weight + j) - correction);
}

} // namespace skipkernels
