// mlp_activation: bias and activation of an MLP.
//
//   u = x + bias,   out = u · g(u),   d_x = d_out · (g(u) + u · g'(u)),   d_bias = Σ d_x over all rows
//   quick_gelu: g(u) = σ(1.702 u);   gelu: g(u) = Φ(u);   gelu_tanh: g(u) = σ(2 √(2/π) (u + 0.044715 u³))
//   swiglu, of rows (u, v) twice as wide: g(u) = σ(u),   out = u · g(u) · v,   d_v = d_out · u · g(u),
//     d_u = d_out · v · (g(u) + u · g'(u))
//
// Map: blocks of rows are tasks (RowPlan). A row is processed CHUNK numbers at a time in a buffer of the type of
// arithmetic: load, compute in place, store.
#include <tuple>

#include "rows.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "mlp_activation";
constexpr int64_t CHUNK = 512; // 2 KiB in fp32: the L1 cache has room for it beside the rows

enum class Kind { quick_gelu, gelu, gelu_tanh, swiglu }; // as KINDS of skipkernels/ops/mlp_activation.py

// Relative errors of the functions below, and therefore of g for negative u, where g vanishes. With ROUGH, for 16-bit
// results: below 2.6e-5, a tenth of half a step of fp16. Else: below 1e-8 plus rounding, which is t · 2⁻²³ + 4 · 2⁻²⁴
// where g has the size of exp(−t). The polynomials are least-squares fits, weighted to minimise the largest relative
// error.

// 2ᵗ for −127.4 < t < 127.4, and 0 below −126.5.
template <bool ROUGH>
SKIPKERNELS_INLINE float exp2_bounded(float t) {
  const float rounder = 12582912.0f + 127.0f; // 1.5 · 2²³: adding it rounds to an integer; 127 is the exponent of 2⁰
  const float shifted = t + rounder;
  const float f = t - (shifted - rounder); // at most 1/2
  float p;
  if constexpr (ROUGH) {
    p = 0.00957010143f;
    p = p * f + 0.0559178603f;
    p = p * f + 0.240247448f;
    p = p * f + 0.693121815f;
    p = p * f + 0.999999261f;
  } else {
    p = 0.000153458115f;
    p = p * f + 0.00133999312f;
    p = p * f + 0.00961848896f;
    p = p * f + 0.0555032878f;
    p = p * f + 0.240226469f;
    p = p * f + 0.693147206f;
    p = p * f + 1.0f;
  }
  return p * bits_as<float>(bits_as<uint32_t>(shifted) << 23);
}
// Φ(−a)/exp(−a²/2) for 0 ≤ a ≤ 13.5, accurate where 1 + erf would cancel.
template <bool ROUGH>
SKIPKERNELS_INLINE float normal_tail(float a) {
  float p, q;
  if constexpr (ROUGH) {
    p = 0.0621774999f;
    p = p * a + 0.27744777f;
    p = p * a + 0.500011639f;
    q = 0.155671343f;
    q = q * a + 0.700676212f;
    q = q * a + 1.35350604f;
    q = q * a + 1.0f;
  } else {
    p = 0.00403701387f;
    p = p * a + 0.0400981553f;
    p = p * a + 0.181646097f;
    p = p * a + 0.436146581f;
    p = p * a + 0.5f;
    q = 0.0101191543f;
    q = q * a + 0.100518379f;
    q = q * a + 0.465275932f;
    q = q * a + 1.19589726f;
    q = q * a + 1.67017809f;
    q = q * a + 1.0f;
  }
  return p / q;
}

// g(u) and g'(u).
template <class A>
struct Gate {
  A value, slope;
};

template <Kind KIND>
constexpr double SIGMOID_FACTOR = KIND == Kind::quick_gelu ? 1.702 : 1.0;
constexpr double TANH_FACTOR = 1.5957691216057308, TANH_CUBIC = 0.044715; // 2 √(2/π)

// Where g rounds to 1 or 0, g must be exactly 1 or 0, and g' exactly 0: u may be 1e38.
template <Kind KIND, bool ROUGH>
SKIPKERNELS_INLINE Gate<float> gate(float u) {
  constexpr float LOG2_E = 1.44269504f;
  if constexpr (KIND == Kind::gelu) {
    const float a = std::abs(u) < 13.5f ? std::abs(u) : 13.5f, t = u * u * (-0.5f * LOG2_E);
    const float e = exp2_bounded<ROUGH>(t < -127.0f ? -127.0f : t), tail = e * normal_tail<ROUGH>(a);
    return {u < 0 ? tail : 1 - tail, e * 0.398942280f};
  } else {
    float t, scale; // g = σ(z), t = −z · log₂ e − 1, scale = z'
    if constexpr (KIND != Kind::gelu_tanh) {
      scale = float(SIGMOID_FACTOR<KIND>);
      t = u * (-scale * LOG2_E) - 1;
    } else {
      constexpr float FACTOR = float(TANH_FACTOR), CUBIC = float(TANH_CUBIC), BOUND = 11; // beyond, g is 0 or 1
      const float inner = u < -BOUND ? -BOUND : u > BOUND ? BOUND : u, square = inner * inner;
      t = inner * (-FACTOR * LOG2_E) * (1 + CUBIC * square) - 1;
      scale = FACTOR + 3 * FACTOR * CUBIC * square;
    }
    // Half of exp(−z), which itself overflows where g is still subnormal and u · g is a normal number.
    const bool is_zero = t > 127.0f;
    const float half = exp2_bounded<ROUGH>(t < -127.0f ? -127.0f : is_zero ? 127.0f : t);
    const float value = is_zero ? 0.0f : 0.5f / (0.5f + half);
    return {value, scale * (value * (2 * (half * value)))};
  }
}

template <Kind KIND, bool ROUGH>
SKIPKERNELS_INLINE Gate<double> gate(double u) {
  if constexpr (KIND == Kind::gelu) {
    return {0.5 * std::erfc(u * -0.70710678118654752), std::exp(-0.5 * u * u) * 0.39894228040143268};
  } else {
    double scale = SIGMOID_FACTOR<KIND>, z = scale * u;
    if constexpr (KIND == Kind::gelu_tanh) {
      const double inner = std::min(std::max(u, -30.0), 30.0), square = inner * inner;
      z = TANH_FACTOR * inner * (1 + TANH_CUBIC * square);
      scale = TANH_FACTOR * (1 + 3 * TANH_CUBIC * square);
    }
    const double e = std::exp(-std::abs(z)), upper = 1 / (1 + e);
    return {z < 0 ? e * upper : upper, scale * (e * upper * upper)};
  }
}

template <class T, class A = accumulate_t<T>>
struct Problem {
  int64_t W; // of out; x has rows of W numbers, for swiglu of 2W
  const T *x, *d_out; // d_out: backward only
  const A *bias, *bias_v; // bias_v: of v, swiglu only
  T *out, *d_x; // null if not needed
};

template <Kind KIND>
constexpr int64_t PARTS = KIND == Kind::swiglu ? 2 : 1; // W numbers each, of a row of x

// u = x + bias, in slots.
template <class T, class A>
SKIPKERNELS_INLINE void load_sum(A* u, const T* x, const A* bias, int64_t W) {
  for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
    store_slots<T>(u + i, load_columns(x + i, n) + load_slots<T>(bias + i));
  });
}

template <Kind KIND, class T, class A>
SKIPKERNELS_INLINE void forward_rows_body(const Problem<T>& problem, int64_t begin, int64_t end) {
  const int64_t W = problem.W;
  alignas(64) A u[CHUNK], v[CHUNK];
  for (int64_t r = begin; r < end; ++r)
    for (int64_t start = 0; start < W; start += CHUNK) {
      const int64_t count = std::min(CHUNK, W - start), padded = slots<T>(count);
      const T* x = problem.x + r * W * PARTS<KIND> + start;
      load_sum(u, x, problem.bias + start, count);
      if constexpr (KIND == Kind::swiglu)
        load_sum(v, x + W, problem.bias_v + start, count);
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) {
        u[i] *= gate<KIND, is_16_bit<T>>(u[i]).value;
        if constexpr (KIND == Kind::swiglu)
          u[i] *= v[i];
      }
      T* out = problem.out + r * W + start;
      for_columns<T>(count, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
        Columns<T> result = load_slots<T>(u + i);
        store_columns(out + i, result, n);
      });
    }
}

// d_x = d_out · factor for W columns of a row of x, and its sum; null if not needed.
template <class T, class A>
SKIPKERNELS_INLINE void store_product(T* d_x, A* sum, const T* d_out, const A* factor, int64_t W) {
  for_columns<T>(W, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
    Columns<T> product = load_columns(d_out + i, n) * load_slots<T>(factor + i);
    if (sum != nullptr)
      store_slots<T>(sum + i, load_slots<T>(sum + i) + product);
    if (d_x != nullptr)
      store_columns(d_x + i, product, n);
  });
}

template <Kind KIND, class T, class A>
SKIPKERNELS_INLINE void backward_rows_body(
    const Problem<T>& problem, int64_t begin, int64_t end, A* d_bias, A* d_bias_v) {
  const auto at_or_null = [](auto* data, int64_t i) { return data == nullptr ? nullptr : data + i; };
  const int64_t W = problem.W;
  alignas(64) A u[CHUNK], active[CHUNK], v[CHUNK];
  for (int64_t r = begin; r < end; ++r)
    for (int64_t start = 0; start < W; start += CHUNK) {
      const int64_t count = std::min(CHUNK, W - start), padded = slots<T>(count);
      const int64_t at = r * W + start, at_x = r * W * PARTS<KIND> + start;
      load_sum(u, problem.x + at_x, problem.bias + start, count);
      if constexpr (KIND == Kind::swiglu)
        load_sum(v, problem.x + at_x + W, problem.bias_v + start, count);
      // active is computed also where out is not needed: one product beside an exponential.
#pragma omp simd
      for (int64_t i = 0; i < padded; ++i) {
        const Gate<A> g = gate<KIND, is_16_bit<T>>(u[i]);
        active[i] = u[i] * g.value;
        u[i] = g.value + u[i] * g.slope;
        if constexpr (KIND == Kind::swiglu) {
          const A d_v = active[i]; // up to d_out, as u
          active[i] *= v[i];
          u[i] *= v[i];
          v[i] = d_v;
        }
      }
      if (problem.out != nullptr)
        for_columns<T>(count, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
          Columns<T> result = load_slots<T>(active + i);
          store_columns(problem.out + at + i, result, n);
        });
      const T* d_out = problem.d_out + at;
      store_product<T, A>(at_or_null(problem.d_x, at_x), at_or_null(d_bias, start), d_out, u, count);
      if constexpr (KIND == Kind::swiglu)
        store_product<T, A>(at_or_null(problem.d_x, at_x + W), at_or_null(d_bias_v, start), d_out, v, count);
    }
}

#define DEFINE_KIND_LOOPS(KIND, T, A)                                                       \
  MULTIVERSION void forward_##KIND(const Problem<T>& problem, int64_t begin, int64_t end) { \
    forward_rows_body<Kind::KIND, T, A>(problem, begin, end);                               \
  }                                                                                         \
  MULTIVERSION void backward_##KIND(                                                        \
      const Problem<T>& problem, int64_t begin, int64_t end, A* d_bias, A* d_bias_v) {      \
    backward_rows_body<Kind::KIND, T, A>(problem, begin, end, d_bias, d_bias_v);            \
  }
#define DEFINE_ROW_LOOPS(T, A)        \
  DEFINE_KIND_LOOPS(quick_gelu, T, A) \
  DEFINE_KIND_LOOPS(gelu, T, A)       \
  DEFINE_KIND_LOOPS(gelu_tanh, T, A)  \
  DEFINE_KIND_LOOPS(swiglu, T, A)

DEFINE_ROW_LOOPS(float, float)
DEFINE_ROW_LOOPS(double, double)
DEFINE_ROW_LOOPS(BFloat16, float)
DEFINE_ROW_LOOPS(Half, float)

// skipkernels.functional validates the inputs; these checks keep direct calls from accessing memory out of bounds.
void check_shapes(const Tensor& x, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, NAME, ": x must be [..., W] with W at least 1.");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == x.size(x.dim() - 1)), NAME, ": bias must be [W].");
}

Kind kind_of(int64_t index, const Tensor& x) {
  STD_TORCH_CHECK(
      index >= 0 && index <= int64_t(Kind::swiglu), NAME,
      ": kind must be 0 (quick_gelu), 1 (gelu), 2 (gelu_tanh) or 3 (swiglu); got ", index, ".");
  const Kind kind = Kind(index);
  STD_TORCH_CHECK(
      kind != Kind::swiglu || x.size(x.dim() - 1) % 2 == 0, NAME, ": x must be [..., 2W] with kind 3 (swiglu).");
  return kind;
}

// The shape of the result.
std::vector<int64_t> result_sizes(const Tensor& x, Kind kind) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i)
    sizes.push_back(x.size(i));
  if (kind == Kind::swiglu)
    sizes.back() /= 2;
  return sizes;
}

Tensor mlp_activation(const Tensor& x_, const std::optional<Tensor>& bias_, int64_t kind_) {
  check_shapes(x_, bias_);
  const Kind kind = kind_of(kind_, x_);
  const Tensor x = as_contiguous(x_);
  Tensor out = make_empty(result_sizes(x, kind), x.scalar_type());
  dispatch_features(x, NAME, [&](auto type) {
    using T = decltype(type);
    const RowPlan plan = rows_of_width(out);
    const bool gated = kind == Kind::swiglu;
    const Slots<T> bias(bias_, plan.W), bias_v(gated ? bias_ : std::nullopt, plan.W, plan.W);
    const Problem<T> problem{
        plan.W, x.const_data_ptr<T>(), nullptr, bias, bias_v, out.mutable_data_ptr<T>(), nullptr};
    parallel_rows(plan, [&](int64_t, int64_t begin, int64_t end) {
      if (kind == Kind::quick_gelu)
        forward_quick_gelu(problem, begin, end);
      else if (kind == Kind::gelu)
        forward_gelu(problem, begin, end);
      else if (kind == Kind::gelu_tanh)
        forward_gelu_tanh(problem, begin, end);
      else
        forward_swiglu(problem, begin, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_activation_backward(
    const Tensor& d_out_, const Tensor& x_, const std::optional<Tensor>& bias_, int64_t kind_, bool need_x,
    bool need_bias, bool need_out, bool /* partial: the sums are cheap to complete here */) {
  check_shapes(x_, bias_);
  const Kind kind = kind_of(kind_, x_);
  STD_TORCH_CHECK(
      d_out_.sizes().equals(result_sizes(x_, kind)) && d_out_.scalar_type() == x_.scalar_type(), NAME,
      ": d_out must have the shape and the dtype of the result.");
  STD_TORCH_CHECK(bias_ || !need_bias, NAME, ": without a bias there is no gradient of it.");
  const Tensor x = as_contiguous(x_), d_out = as_contiguous(d_out_);
  Tensor d_x = empty_if(need_x, x), out = empty_if(need_out, d_out);
  Tensor d_bias = make_empty({need_bias ? bias_->size(0) : 0}, (bias_ ? *bias_ : x).scalar_type());
  dispatch_features(x, NAME, [&](auto type) {
    using T = decltype(type);
    const RowPlan plan = rows_of_width(d_out);
    const bool gated = kind == Kind::swiglu;
    const Slots<T> bias(bias_, plan.W), bias_v(gated ? bias_ : std::nullopt, plan.W, plan.W);
    const ColumnSums<T> sums(plan, need_bias), sums_v(plan, need_bias && gated);
    const Problem<T> problem{
        plan.W,
        x.const_data_ptr<T>(),
        d_out.const_data_ptr<T>(),
        bias,
        bias_v,
        need_out ? out.mutable_data_ptr<T>() : nullptr,
        need_x ? d_x.mutable_data_ptr<T>() : nullptr};
    parallel_rows(plan, [&](int64_t block, int64_t begin, int64_t end) {
      auto *const block_sums = sums.start(block), *const block_sums_v = sums_v.start(block);
      if (kind == Kind::quick_gelu)
        backward_quick_gelu(problem, begin, end, block_sums, block_sums_v);
      else if (kind == Kind::gelu)
        backward_gelu(problem, begin, end, block_sums, block_sums_v);
      else if (kind == Kind::gelu_tanh)
        backward_gelu_tanh(problem, begin, end, block_sums, block_sums_v);
      else
        backward_swiglu(problem, begin, end, block_sums, block_sums_v);
    });
    sums.add_up(d_bias, 0);
    sums_v.add_up(d_bias, plan.W);
  });
  return {d_x, d_bias, out, empty_if(false, d_bias)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("mlp_activation", TORCH_BOX(&mlp_activation));
  m.impl("mlp_activation_backward", TORCH_BOX(&mlp_activation_backward));
}

} // namespace skipkernels
