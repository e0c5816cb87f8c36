// add_layer_norm: residual addition and LayerNorm or RMSNorm of the sum.
//
//   hidden = x + residual, rounded to the type of x;   x̂ = (hidden − mean) · rstd;   normed = x̂ · weight + bias
//   g = d_normed · weight
//   d_x = d_residual = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂))
//   d_weight = Σ d_normed · x̂,   d_bias = Σ d_normed   over all rows
//
// With rms, RMSNorm: mean = 0 and mean(g) = 0; the pointer of the means is null.
//
// Map: blocks of rows are tasks (RowPlan). Forward and backward read a row from memory once, and then from the L1
// cache. If the features have several types, each row is converted to the type of arithmetic in a buffer, and results
// from it; the loops over its numbers are the same.
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
  const A *mean, *rstd, *weight, *bias;
  T *d_x, *normed;
};

// Sums over rows, in slots. The first two, and the last two, are null if not needed.
template <class A>
struct Sums {
  A *d_weight, *d_bias, *d_hidden, *d_x;
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
    } else if (f.mean != nullptr) {
      for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA { sum = sum + load_columns(x + i, n); });
    }
    const A mean = f.mean != nullptr ? sum.sum() / A(W) : A(0);
    // From the centred row: E[x²] − E[x]² would cancel where the mean is large.
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> centred = only(load_columns(row + i, n) - mean, n);
      squares = squares + centred * centred;
    });
    const A variance = squares.sum() / A(W) + f.eps;
    // As in PyTorch, but NaN, not 0, where the variance overflows.
    const A rstd = variance < std::numeric_limits<A>::infinity() ? 1 / std::sqrt(variance)
                                                                 : std::numeric_limits<A>::quiet_NaN();
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> unit = (load_columns(row + i, n) - mean) * rstd;
      Columns<T> scaled = unit * load_slots<T>(f.weight + i) + load_slots<T>(f.bias + i);
      store_columns(normed + i, scaled, n);
    });
    if (f.mean != nullptr)
      f.mean[r] = mean;
    f.rstd[r] = rstd;
  }
}

template <class T, class A>
SKIPKERNELS_INLINE void add_to_slots(A* sum, const Columns<T>& x) {
  store_slots(sum, load_slots<T>(sum) + x);
}

// The flags say which pointers are not null; they are template arguments, so that the inner loops have no branches.
template <bool D_X, bool D_HIDDEN, bool SUMS, class T, class A>
SKIPKERNELS_INLINE void backward_rows_body(const Backward<T>& b, int64_t begin, int64_t end, const Sums<A>& sums) {
  const int64_t W = b.W;
  for (int64_t r = begin; r < end; ++r) {
    const T *d_normed = b.d_normed + r * W, *hidden = b.hidden + r * W;
    const A mean = b.mean != nullptr ? b.mean[r] : A(0), rstd = b.rstd[r];
    Columns<T> sum_g = {}, sum_gx = {};
    if constexpr (D_X)
      for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
        const Columns<T> g = load_columns(d_normed + i, n) * load_slots<T>(b.weight + i);
        sum_g = sum_g + g;
        sum_gx = sum_gx + g * ((load_columns(hidden + i, n) - mean) * rstd);
      });
    const A mean_g = b.mean != nullptr ? sum_g.sum() / A(W) : A(0), mean_gx = sum_gx.sum() / A(W);
    for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> upstream = load_columns(d_normed + i, n);
      const Columns<T> unit = (load_columns(hidden + i, n) - mean) * rstd;
      if constexpr (SUMS) {
        add_to_slots(sums.d_weight + i, upstream * unit);
        add_to_slots(sums.d_bias + i, upstream);
      }
      if (b.normed != nullptr) {
        Columns<T> normed = unit * load_slots<T>(b.weight + i) + load_slots<T>(b.bias + i);
        store_columns(b.normed + r * W + i, normed, n);
      }
      if constexpr (D_X) {
        Columns<T> d_row = (upstream * load_slots<T>(b.weight + i) - mean_g + unit * -mean_gx) * rstd;
        if constexpr (D_HIDDEN) {
          const Columns<T> d_hidden = load_columns(b.d_hidden + r * W + i, n);
          d_row = d_row + d_hidden;
          if (sums.d_x != nullptr) {
            add_to_slots(sums.d_hidden + i, d_hidden);
            add_to_slots(sums.d_x + i, d_row);
          }
        }
        store_columns(b.d_x + r * W + i, d_row, n);
      }
    });
  }
}

#define DEFINE_ROW_LOOPS(T, A)                                                                             \
  MULTIVERSION void forward_rows(const Forward<T>& f, int64_t begin, int64_t end) {                        \
    forward_rows_body<T, A>(f, begin, end);                                                                \
  }                                                                                                        \
  MULTIVERSION void backward_rows(const Backward<T>& b, int64_t begin, int64_t end, const Sums<A>& sums) { \
    if (b.d_x != nullptr && b.d_hidden != nullptr && sums.d_weight != nullptr)                             \
      backward_rows_body<true, true, true, T, A>(b, begin, end, sums);                                     \
    else if (b.d_x != nullptr && b.d_hidden != nullptr)                                                    \
      backward_rows_body<true, true, false, T, A>(b, begin, end, sums);                                    \
    else if (b.d_x != nullptr && sums.d_weight != nullptr)                                                 \
      backward_rows_body<true, false, true, T, A>(b, begin, end, sums);                                    \
    else if (b.d_x != nullptr)                                                                             \
      backward_rows_body<true, false, false, T, A>(b, begin, end, sums);                                   \
    else if (sums.d_weight != nullptr)                                                                     \
      backward_rows_body<false, false, true, T, A>(b, begin, end, sums);                                   \
    else if (b.normed != nullptr)                                                                          \
      backward_rows_body<false, false, false, T, A>(b, begin, end, sums);                                  \
  }

DEFINE_ROW_LOOPS(float, float)
DEFINE_ROW_LOOPS(double, double)
DEFINE_ROW_LOOPS(BFloat16, float)
DEFINE_ROW_LOOPS(Half, float)

// skipkernels.functional validates the inputs; these checks keep direct calls from accessing memory out of bounds.
void check_vector(const Tensor& vector, int64_t W, const char* argument) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == W, NAME, ": ", argument, " must be [W].");
}

// One row at a time, since x, residual and normed have several types. A is the type of arithmetic of x.
template <class A>
void forward_converted_rows(
    Forward<A> f, const Tensor& x_, const std::optional<Tensor>& residual_, Tensor& hidden_, Tensor& normed_,
    int64_t begin, int64_t end) {
  const int64_t W = f.W;
  const ConvertedRows<A> x(x_, W), residual(residual_ ? *residual_ : x_, W);
  ConvertedRows<A> hidden(hidden_, W), normed(normed_, W);
  const auto buffer = scratch<A>(W), residual_buffer = scratch<A>(W), normed_buffer = scratch<A>(W);
  A *const mean = f.mean, *const rstd = f.rstd;
  for (int64_t r = begin; r < end; ++r) {
    f.x = x.load(r, buffer.get());
    f.residual = f.hidden = nullptr;
    if (residual_ && hidden_.scalar_type() == scalar_type_of<A>) {
      f.residual = residual.load(r, residual_buffer.get());
      f.hidden = hidden.destination(r, nullptr);
    } else if (residual_) { // normed is computed from the rounded sum
      add(buffer.get(), residual.load(r, residual_buffer.get()), W);
      hidden.store(r, buffer.get());
      f.x = hidden.load(r, buffer.get());
    }
    f.normed = normed.destination(r, normed_buffer.get());
    f.mean = mean == nullptr ? nullptr : mean + r;
    f.rstd = rstd + r;
    forward_rows(f, 0, 1);
    normed.store(r, f.normed);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x_, const std::optional<Tensor>& residual_, const Tensor& weight_, const std::optional<Tensor>& bias_,
    double eps, std::optional<ScalarType> dtype, bool rms) {
  STD_TORCH_CHECK(x_.dim() > 0 && x_.size(x_.dim() - 1) > 0, NAME, ": x must be [..., W] with W at least 1.");
  const int64_t W = x_.size(x_.dim() - 1), R = x_.numel() / W;
  STD_TORCH_CHECK(!residual_ || same_sizes(x_, *residual_), NAME, ": residual must have the shape of x.");
  check_vector(weight_, W, "weight");
  if (bias_)
    check_vector(*bias_, W, "bias");
  const Tensor x = as_contiguous(x_);
  const std::optional<Tensor> residual = residual_ ? std::optional(as_contiguous(*residual_)) : std::nullopt;
  const ScalarType type_of_x = x.scalar_type();
  Tensor hidden = empty_if(residual.has_value(), x), normed = empty_if(true, x, dtype);
  const bool one_type = normed.scalar_type() == type_of_x && (!residual || residual->scalar_type() == type_of_x);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> outputs;
  dispatch_features(x, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const auto sizes = x.sizes();
    Tensor rstd = make_empty<A>(sizes.slice(0, sizes.size() - 1));
    Tensor mean = empty_if(!rms, rstd);
    A *const means = rms ? nullptr : mean.mutable_data_ptr<A>(), *const rstds = rstd.mutable_data_ptr<A>();
    const RowPlan plan(R, W);
    if (one_type) {
      const Slots<T> weight(weight_, W), bias(bias_, W);
      const Forward<T> f{
          W,
          x.const_data_ptr<T>(),
          residual ? residual->const_data_ptr<T>() : nullptr,
          weight,
          bias,
          A(eps),
          hidden.mutable_data_ptr<T>(),
          normed.mutable_data_ptr<T>(),
          means,
          rstds};
      parallel_rows(plan, [&](int64_t, int64_t begin, int64_t end) { forward_rows(f, begin, end); });
    } else {
      const Slots<A> weight(weight_, W), bias(bias_, W);
      const Forward<A> f{W, nullptr, nullptr, weight, bias, A(eps), nullptr, nullptr, means, rstds};
      parallel_rows(plan, [&](int64_t, int64_t begin, int64_t end) {
        forward_converted_rows<A>(f, x, residual, hidden, normed, begin, end);
      });
    }
    outputs.emplace(hidden, normed, mean, rstd);
  });
  return *outputs;
}

// One row at a time, since the tensors have several types.
template <class A>
void backward_converted_rows(
    Backward<A> b, const Tensor& d_normed_, const std::optional<Tensor>& d_hidden_, const Tensor& hidden_, Tensor& d_x_,
    Tensor& d_x_cast_, Tensor& normed_, bool need_x, bool need_cast, bool need_normed, int64_t begin, int64_t end,
    const Sums<A>& sums) {
  const int64_t W = b.W;
  const ConvertedRows<A> d_normed(d_normed_, W), d_hidden(d_hidden_ ? *d_hidden_ : d_normed_, W), hidden(hidden_, W);
  ConvertedRows<A> d_x(d_x_, W), d_x_cast(d_x_cast_, W), normed(normed_, W);
  Scratch<A> buffers[5];
  for (auto& buffer : buffers)
    buffer = scratch<A>(W);
  const A *const mean = b.mean, *const rstd = b.rstd;
  for (int64_t r = begin; r < end; ++r) {
    b.d_normed = d_normed.load(r, buffers[0].get());
    b.d_hidden = d_hidden_ ? d_hidden.load(r, buffers[1].get()) : nullptr;
    b.hidden = hidden.load(r, buffers[2].get());
    b.d_x = need_x ? d_x.destination(r, buffers[3].get()) : nullptr;
    b.normed = need_normed ? normed.destination(r, buffers[4].get()) : nullptr;
    b.mean = mean == nullptr ? nullptr : mean + r;
    b.rstd = rstd + r;
    backward_rows(b, 0, 1, sums);
    if (need_x)
      d_x.store(r, b.d_x);
    if (need_cast)
      d_x_cast.store(r, b.d_x);
    if (need_normed)
      normed.store(r, b.normed);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& d_normed_, const std::optional<Tensor>& d_hidden_, const Tensor& hidden_, const Tensor& mean_,
    const Tensor& rstd_, const Tensor& weight_, const std::optional<Tensor>& bias_, bool need_x, bool need_weight,
    bool need_bias, bool need_sums, bool /* partial: the sums are cheap to complete here */,
    std::optional<ScalarType> cast, bool need_normed, bool rms) {
  STD_TORCH_CHECK(
      hidden_.dim() > 0 && hidden_.size(hidden_.dim() - 1) > 0, NAME, ": hidden must be [..., W] with W at least 1.");
  const int64_t W = hidden_.size(hidden_.dim() - 1), R = hidden_.numel() / W;
  STD_TORCH_CHECK(
      same_sizes(hidden_, d_normed_) && (!d_hidden_ || same_sizes(hidden_, *d_hidden_)), NAME,
      ": d_normed and d_hidden must have the shape of hidden.");
  STD_TORCH_CHECK(need_x || !cast, NAME, ": a cast of d_x needs d_x.");
  STD_TORCH_CHECK((need_x && d_hidden_) || !need_sums, NAME, ": the sums need d_hidden and d_x.");
  check_vector(weight_, W, "weight");
  if (bias_)
    check_vector(*bias_, W, "bias");
  const Tensor hidden = as_contiguous(hidden_), d_normed = as_contiguous(d_normed_), mean = as_contiguous(mean_);
  const Tensor rstd = as_contiguous(rstd_);
  const std::optional<Tensor> d_hidden = d_hidden_ ? std::optional(as_contiguous(*d_hidden_)) : std::nullopt;
  Tensor d_x = empty_if(need_x, hidden), d_x_cast = empty_if(cast.has_value(), hidden, cast);
  Tensor normed = empty_if(need_normed, hidden, d_normed.scalar_type());
  const auto has_type_of_hidden = [&](const Tensor& x) { return x.scalar_type() == hidden.scalar_type(); };
  const bool one_type = has_type_of_hidden(d_normed) && (!d_hidden || has_type_of_hidden(*d_hidden)) && !cast;
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> outputs;
  dispatch_features(hidden, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    STD_TORCH_CHECK(
        (rms || mean.numel() == R) && rstd.numel() == R && mean.scalar_type() == scalar_type_of<A> &&
            rstd.scalar_type() == scalar_type_of<A>,
        NAME, ": backward must be given what forward returned.");
    const A *const means = rms ? nullptr : mean.const_data_ptr<A>(), *const rstds = rstd.const_data_ptr<A>();
    const RowPlan plan(R, W);
    // Calls rows(begin, end, sums) for every block. The sums are in the order of slots of S.
    const auto sum_blocks = [&](auto slot_type, const auto& rows) {
      using S = decltype(slot_type);
      const ColumnSums<S> d_weight(plan, need_weight || need_bias), d_bias(plan, need_weight || need_bias);
      const ColumnSums<S> d_hidden_sum(plan, need_sums), d_x_sum(plan, need_sums);
      parallel_rows(plan, [&](int64_t block, int64_t begin, int64_t end) {
        rows(
            begin, end,
            Sums<A>{d_weight.start(block), d_bias.start(block), d_hidden_sum.start(block), d_x_sum.start(block)});
      });
      outputs.emplace(
          d_x, d_weight.total(weight_, need_weight), d_bias.total(weight_, need_bias), d_x_cast, normed,
          d_hidden_sum.total(weight_, need_sums), d_x_sum.total(weight_, need_sums), empty_if(false, mean));
    };
    if (one_type) {
      const Slots<T> weight(weight_, W), bias(bias_, W);
      const Backward<T> b{
          W,
          d_normed.const_data_ptr<T>(),
          d_hidden ? d_hidden->const_data_ptr<T>() : nullptr,
          hidden.const_data_ptr<T>(),
          means,
          rstds,
          weight,
          bias,
          need_x ? d_x.mutable_data_ptr<T>() : nullptr,
          need_normed ? normed.mutable_data_ptr<T>() : nullptr};
      sum_blocks(T(), [&](int64_t begin, int64_t end, const Sums<A>& sums) { backward_rows(b, begin, end, sums); });
    } else {
      const Slots<A> weight(weight_, W), bias(bias_, W);
      const Backward<A> b{W, nullptr, nullptr, nullptr, means, rstds, weight, bias, nullptr, nullptr};
      sum_blocks(A(), [&](int64_t begin, int64_t end, const Sums<A>& sums) {
        backward_converted_rows<A>(
            b, d_normed, d_hidden, hidden, d_x, d_x_cast, normed, need_x, cast.has_value(), need_normed, begin, end,
            sums);
      });
    }
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

} // namespace skipkernels
