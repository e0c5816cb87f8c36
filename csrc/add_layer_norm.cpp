// add_layer_norm: residual addition and LayerNorm of the sum.
//
//   hidden = x + residual, rounded to the type of x;   x̂ = (hidden − mean) · rstd;   normed = x̂ · weight + bias
//   g = d_normed · weight
//   d_x = d_residual = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂))
//   d_weight = Σ d_normed · x̂,   d_bias = Σ d_normed   over all rows
//
// Map: blocks of rows are tasks (RowPlan). Forward and backward read a row from memory once, and then from the L1
// cache.
#include <tuple>

#include "rows.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "add_layer_norm";

// Absent inputs, and outputs that are not needed, are null. hidden is written only with a residual.
template <class T, class A = accumulate_t<T>>
struct Forward {
  int64_t W;
  const T *x, *residual;
  const A *weight, *bias;
  A eps;
  T *hidden, *normed;
  A *mean, *rstd;
};

template <class T, class A = accumulate_t<T>>
struct Backward {
  int64_t W;
  const T *d_normed, *d_hidden, *hidden;
  const A *mean, *rstd, *weight;
  T* d_x;
};

template <class T, class A>
SKIPKERNELS_INLINE void forward_rows_body(const Forward<T>& f, int64_t begin, int64_t end) {
  const int64_t W = f.W;
  for (int64_t r = begin; r < end; ++r) {
    const T *x = f.x + r * W, *row = x;
    T* normed = f.normed + r * W;
    Columns<T> sum = {}, squares = {};
    if (f.residual != nullptr) {
      const T* residual = f.residual + r * W;
      T* hidden = f.hidden + r * W;
      row = hidden;
      for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
        Columns<T> added = load_columns(x + i, n) + load_columns(residual + i, n);
        store_columns(hidden + i, added, n);
        sum = sum + added;
      });
    } else {
      for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA { sum = sum + load_columns(x + i, n); });
    }
    const A mean = sum.sum() / A(W);
    // From the centred row: E[x²] − E[x]² would cancel where the mean is large.
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> centred = only(load_columns(row + i, n) - mean, n);
      squares = squares + centred * centred;
    });
    const A variance = squares.sum() / A(W) + f.eps;
    const A rstd = std::sqrt(variance) / variance; // NaN where the variance overflows, not 0
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> unit = (load_columns(row + i, n) - mean) * rstd;
      Columns<T> scaled = unit * load_slots<T>(f.weight + i) + load_slots<T>(f.bias + i);
      store_columns(normed + i, scaled, n);
    });
    f.mean[r] = mean;
    f.rstd[r] = rstd;
  }
}

// The flags say which pointers are not null; they are template arguments, so that the inner loops have no branches.
template <bool D_X, bool D_HIDDEN, bool SUMS, class T, class A>
SKIPKERNELS_INLINE void backward_rows_body(const Backward<T>& b, int64_t begin, int64_t end, A* d_weight, A* d_bias) {
  const int64_t W = b.W;
  for (int64_t r = begin; r < end; ++r) {
    const T *d_normed = b.d_normed + r * W, *hidden = b.hidden + r * W;
    const A mean = b.mean[r], rstd = b.rstd[r];
    Columns<T> sum_g = {}, sum_gx = {};
    if constexpr (D_X)
      for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
        const Columns<T> g = load_columns(d_normed + i, n) * load_slots<T>(b.weight + i);
        sum_g = sum_g + g;
        sum_gx = sum_gx + g * ((load_columns(hidden + i, n) - mean) * rstd);
      });
    const A mean_g = sum_g.sum() / A(W), mean_gx = sum_gx.sum() / A(W);
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> upstream = load_columns(d_normed + i, n);
      const Columns<T> unit = (load_columns(hidden + i, n) - mean) * rstd;
      if constexpr (SUMS) {
        store_slots(d_weight + i, load_slots<T>(d_weight + i) + upstream * unit);
        store_slots(d_bias + i, load_slots<T>(d_bias + i) + upstream);
      }
      if constexpr (D_X) {
        Columns<T> d_row = (upstream * load_slots<T>(b.weight + i) - mean_g + unit * -mean_gx) * rstd;
        if constexpr (D_HIDDEN)
          d_row = d_row + load_columns(b.d_hidden + r * W + i, n);
        store_columns(b.d_x + r * W + i, d_row, n);
      }
    });
  }
}

#define DEFINE_ROW_LOOPS(T, A)                                                                                \
  MULTIVERSION void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {                           \
    forward_rows_body<T, A>(f, begin, end);                                                                   \
  }                                                                                                           \
  MULTIVERSION void backward_rows(const Backward<T>& b, int64_t begin, int64_t end, A* d_weight, A* d_bias) { \
    if (b.d_x != nullptr && b.d_hidden != nullptr && d_weight != nullptr)                                     \
      backward_rows_body<true, true, true, T, A>(b, begin, end, d_weight, d_bias);                            \
    else if (b.d_x != nullptr && b.d_hidden != nullptr)                                                       \
      backward_rows_body<true, true, false, T, A>(b, begin, end, d_weight, d_bias);                           \
    else if (b.d_x != nullptr && d_weight != nullptr)                                                         \
      backward_rows_body<true, false, true, T, A>(b, begin, end, d_weight, d_bias);                           \
    else if (b.d_x != nullptr)                                                                                \
      backward_rows_body<true, false, false, T, A>(b, begin, end, d_weight, d_bias);                          \
    else if (d_weight != nullptr)                                                                             \
      backward_rows_body<false, false, true, T, A>(b, begin, end, d_weight, d_bias);                          \
  }

DEFINE_ROW_LOOPS(float, float)
DEFINE_ROW_LOOPS(double, double)
DEFINE_ROW_LOOPS(BFloat16, float)
DEFINE_ROW_LOOPS(Half, float)

// skipkernels.functional validates the inputs; these checks keep direct calls from accessing memory out of bounds.
void check_vector(const Tensor& vector, int64_t W, const char* argument) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == W, NAME, ": ", argument, " must be [W].");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const Tensor& bias_, double eps) {
  STD_TORCH_CHECK(x_.dim() > 0 && x_.size(x_.dim() - 1) > 0, NAME, ": x must be [..., W] with W at least 1.");
  const int64_t W = x_.size(x_.dim() - 1), R = x_.numel() / W;
  if (residual_)
    check_like(NAME, x_, *residual_, "residual");
  check_vector(weight_, W, "weight");
  check_vector(bias_, W, "bias");
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> outputs;
  dispatch_features(x_, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor x = as_contiguous(x_), residual = residual_ ? as_contiguous(*residual_) : x;
    const Slots<T> weight(weight_, W), bias(bias_, W);
    const auto sizes = x.sizes();
    Tensor hidden = empty_if(residual_.has_value(), x);
    Tensor normed = make_empty_like(x);
    Tensor mean = make_empty(sizes.slice(0, sizes.size() - 1), scalar_type_of<A>);
    Tensor rstd = make_empty_like(mean);
    const Forward<T> f{
        W,
        x.const_data_ptr<T>(),
        residual_ ? residual.const_data_ptr<T>() : nullptr,
        weight,
        bias,
        A(eps),
        hidden.mutable_data_ptr<T>(),
        normed.mutable_data_ptr<T>(),
        mean.mutable_data_ptr<A>(),
        rstd.mutable_data_ptr<A>()};
    parallel_rows(RowPlan(R, W), [&](int64_t, int64_t begin, int64_t end) { forward_rows(f, begin, end); });
    outputs.emplace(hidden, normed, mean, rstd);
  });
  return *outputs;
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& d_normed_, const std::optional<Tensor>& d_hidden_, const Tensor& hidden_, const Tensor& mean_,
    const Tensor& rstd_, const Tensor& weight_, bool need_x, bool need_weight, bool need_bias) {
  STD_TORCH_CHECK(
      hidden_.dim() > 0 && hidden_.size(hidden_.dim() - 1) > 0, NAME, ": hidden must be [..., W] with W at least 1.");
  const int64_t W = hidden_.size(hidden_.dim() - 1), R = hidden_.numel() / W;
  check_like(NAME, hidden_, d_normed_, "d_normed");
  if (d_hidden_)
    check_like(NAME, hidden_, *d_hidden_, "d_hidden");
  check_vector(weight_, W, "weight");
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(hidden_, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    STD_TORCH_CHECK(
        mean_.numel() == R && rstd_.numel() == R && mean_.scalar_type() == scalar_type_of<A> &&
            rstd_.scalar_type() == scalar_type_of<A>,
        NAME, ": backward must be given what forward returned.");
    const Tensor hidden = as_contiguous(hidden_), d_normed = as_contiguous(d_normed_), mean = as_contiguous(mean_);
    const Tensor d_hidden = d_hidden_ ? as_contiguous(*d_hidden_) : d_normed, rstd = as_contiguous(rstd_);
    const Slots<T> weight(weight_, W);
    Tensor d_x = empty_if(need_x, hidden);
    const Backward<T> b{
        W,
        d_normed.const_data_ptr<T>(),
        d_hidden_ ? d_hidden.const_data_ptr<T>() : nullptr,
        hidden.const_data_ptr<T>(),
        mean.const_data_ptr<A>(),
        rstd.const_data_ptr<A>(),
        weight,
        need_x ? d_x.mutable_data_ptr<T>() : nullptr};
    const RowPlan plan(R, W);
    const ColumnSums<T> d_weight(plan, need_weight || need_bias), d_bias(plan, need_weight || need_bias);
    parallel_rows(plan, [&](int64_t block, int64_t begin, int64_t end) {
      backward_rows(b, begin, end, d_weight.start(block), d_bias.start(block));
    });
    outputs.emplace(d_x, d_weight.total(weight_, need_weight), d_bias.total(weight_, need_bias));
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

} // namespace skipkernels
