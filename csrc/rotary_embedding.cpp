// rotary_embedding: rotate pairs of columns of each head by angles that depend on the position of the row.
//
//   out_1 = x_1 · cos − x_2 · sin,   out_2 = x_2 · cos + x_1 · sin
//   interleaved: x_1, x_2 are columns 2i and 2i + 1 of a head of width E;   else columns i and i + E/2
//
// Map: blocks of rows are tasks (RowPlan). The cosines and sines of all positions are first converted to the type of
// arithmetic, in the order in which the loop over the pairs of a head reads them.
#include "rows.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "rotary_embedding";

template <class T, class A = accumulate_t<T>>
struct Problem {
  int64_t W, E, rotated, positions; // rotated: columns of a row, a multiple of E
  const T* x;
  const A *cos, *sin; // a row of `stride` numbers for each position
  int64_t stride;
  T* out;
};

// Pairs (i, i + E/2): cos and sin are in slots.
template <class T, class A>
SKIPKERNELS_INLINE void rotate_halves(T* out, const T* x, const A* cos, const A* sin, int64_t E) {
  const int64_t half = E / 2;
  for_columns<T>(half, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
    const Columns<T> x_1 = load_columns(x + i, n), x_2 = load_columns(x + half + i, n);
    const Columns<T> c = load_slots<T>(cos + i), s = load_slots<T>(sin + i);
    Columns<T> out_1 = x_1 * c - x_2 * s, out_2 = x_2 * c + x_1 * s;
    store_columns(out + i, out_1, n);
    store_columns(out + half + i, out_2, n);
  });
}

// Pairs (2i, 2i + 1). Columns of a 16-bit type are such pairs already.
template <class T, class A>
SKIPKERNELS_INLINE void rotate_neighbours(T* out, const T* x, const A* cos, const A* sin, int64_t E) {
  if constexpr (is_16_bit<T>) {
    using V = typename Columns<T>::V;
    for_columns<T>(E, [&](int64_t i, auto n) SKIPKERNELS_INLINE_LAMBDA {
      const Columns<T> pairs = load_columns(x + i, n);
      const V c = *reinterpret_cast<const V*>(cos + i / 2), s = *reinterpret_cast<const V*>(sin + i / 2);
      Columns<T> rotated{pairs.first * c - pairs.second * s, pairs.second * c + pairs.first * s};
      store_columns(out + i, rotated, n);
    });
  } else {
#pragma omp simd
    for (int64_t i = 0; i < E / 2; ++i) {
      const A x_1 = x[2 * i], x_2 = x[2 * i + 1];
      out[2 * i] = x_1 * cos[i] - x_2 * sin[i];
      out[2 * i + 1] = x_2 * cos[i] + x_1 * sin[i];
    }
  }
}

template <bool INTERLEAVED, class T, class A>
SKIPKERNELS_INLINE void rotate_rows_body(const Problem<T>& p, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const int64_t at = r * p.W, angles = r % p.positions * p.stride;
    for (int64_t start = at; start < at + p.rotated; start += p.E) {
      if constexpr (INTERLEAVED)
        rotate_neighbours<T, A>(p.out + start, p.x + start, p.cos + angles, p.sin + angles, p.E);
      else
        rotate_halves<T, A>(p.out + start, p.x + start, p.cos + angles, p.sin + angles, p.E);
    }
    std::copy(p.x + at + p.rotated, p.x + at + p.W, p.out + at + p.rotated);
  }
}

#define DEFINE_ROW_LOOPS(T, A)                                                                  \
  MULTIVERSION void rotate_rows_interleaved(const Problem<T>& p, int64_t begin, int64_t end) { \
    rotate_rows_body<true, T, A>(p, begin, end);                                                \
  }                                                                                             \
  MULTIVERSION void rotate_rows_of_halves(const Problem<T>& p, int64_t begin, int64_t end) {   \
    rotate_rows_body<false, T, A>(p, begin, end);                                               \
  }

DEFINE_ROW_LOOPS(float, float)
DEFINE_ROW_LOOPS(double, double)
DEFINE_ROW_LOOPS(BFloat16, float)
DEFINE_ROW_LOOPS(Half, float)

// All positions of cos or sin, times `sign`, in rows of `stride` numbers: in slots, or for neighbours in order.
template <class T>
Scratch<accumulate_t<T>> angles_of(const Tensor& table, accumulate_t<T> sign, bool interleaved, int64_t stride) {
  using A = accumulate_t<T>;
  const int64_t positions = table.size(0), pairs = table.size(1), row = table.stride(0), column = table.stride(1);
  auto angles = scratch<A>(positions * stride);
  std::fill(&angles[0], &angles[positions * stride], A(0));
  const A* data = table.const_data_ptr<A>();
  for (int64_t t = 0; t < positions; ++t)
    for (int64_t i = 0; i < pairs; ++i) {
      const A number = sign * data[t * row + i * column];
      angles[t * stride + (interleaved ? i : slot<T>(i))] =
          std::isnan(number) ? std::numeric_limits<A>::quiet_NaN() : number; // see round_to_bfloat16
    }
  return angles;
}

// skipkernels.functional validates the inputs; these checks keep direct calls from accessing memory out of bounds.
void check_table(const Tensor& table, const Tensor& cos, ScalarType type, const char* argument) {
  STD_TORCH_CHECK(
      table.dim() == 2 && same_sizes(table, cos) && table.numel() > 0 && table.scalar_type() == type && table.is_cpu(),
      NAME, ": ", argument, " must be [T, E/2] in the type of arithmetic.");
}

Tensor rotary_embedding(
    const Tensor& x_, const Tensor& cos_, const Tensor& sin_, int64_t heads, bool interleaved, bool inverse) {
  const ScalarType type_of_angles = x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_table(cos_, cos_, type_of_angles, "cos");
  check_table(sin_, cos_, type_of_angles, "sin");
  const int64_t T = cos_.size(0), E = 2 * cos_.size(1);
  STD_TORCH_CHECK(
      x_.dim() == 2 && x_.size(0) % T == 0 && x_.size(1) > 0 && x_.size(1) % E == 0, NAME,
      ": x must be [R, W] with R a multiple of T and W of E.");
  STD_TORCH_CHECK(heads >= 0 && heads <= x_.size(1) / E, NAME, ": heads must be 0 to W / E; got ", heads, ".");
  const Tensor x = as_contiguous(x_);
  Tensor out = empty_if(true, x);
  dispatch_features(x, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const int64_t stride = slots<T>(E / 2);
    const auto cos = angles_of<T>(cos_, 1, interleaved, stride);
    const auto sin = angles_of<T>(sin_, inverse ? A(-1) : A(1), interleaved, stride);
    const RowPlan plan = rows_of_width(x);
    const Problem<T> problem{
        plan.W, E, heads * E, cos_.size(0), x.const_data_ptr<T>(), cos.get(), sin.get(), stride,
        out.mutable_data_ptr<T>()};
    parallel_rows(plan, [&](int64_t, int64_t begin, int64_t end) {
      if (interleaved)
        rotate_rows_interleaved(problem, begin, end);
      else
        rotate_rows_of_halves(problem, begin, end);
    });
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
}

} // namespace skipkernels
