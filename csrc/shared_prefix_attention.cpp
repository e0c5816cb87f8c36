// shared_prefix_attention: causal attention of a prefix that all prompts share, once, and of the suffix of each class.
//
//   weight_ij = exp(scale · ⟨q_i, k_j⟩ − lse_i),   j over i's own sequence up to i itself, for a suffix also the prefix
//   out_i = Σ_j weight_ij v_j
//   d_weight_ij = ⟨d_out_i, v_j⟩,   d_score_ij = weight_ij (d_weight_ij − Σ_j weight_ij d_weight_ij)
//   d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i
//
// Map: a task computes a block of classes. For each head its scratch contains the keys and values of the prefix,
// followed by those of one suffix, so that a class is a small attention over one tile of keys. The prefix is one more
// sequence, behind an empty prefix; the first task computes it. Backward stores the gradients of a tile in the same
// layout; the gradient of the prefix is summed over the classes of a task, then over tasks.
#include "attention.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "shared_prefix_attention";
constexpr int64_t GROUP = 8; // queries per product: small, so that few masked keys are multiplied
constexpr int64_t WINDOW = 32; // tokens that are computed for one head before the next head

// Products with keys are fastest in groups of four; surplus keys of a tile are masked like future keys.
constexpr int64_t whole_fours(int64_t keys) {
  return (keys + 3) / 4 * 4;
}

// Query, key and value of each token, or their gradients, in packed rows.
template <class T>
struct Projections {
  Tokens<T> query, key, value;
};

template <class T>
struct Problem {
  int64_t K, H, E, P, longest;
  accumulate_t<T> scale;
  const int64_t* offsets; // start of each suffix behind the prefix, and the end; null if all have one length
  Projections<const T> packed;

  int64_t begin(int64_t k) const {
    return P + (offsets == nullptr ? k * longest : offsets[k]);
  }
};

template <class T>
struct Forward {
  Tokens<T> out;
  double* lse; // [R, H]
};

template <class T>
struct Backward {
  Tokens<const T> d_out;
  Projections<T> d_packed;
};

// Tokens of one sequence: a suffix, or the prefix.
struct Sequence {
  int64_t begin, length;
  int64_t before; // keys in front of its own: P for a suffix, 0 for the prefix
};

// Scratch of a thread. Keys and values: for each head P rows of the prefix, then `longest` rows of a suffix.
template <class T>
struct Workspace {
  using A = accumulate_t<T>;

  int64_t width, keys, columns;
  Scratch<A> key, value, d_key, d_value; // [H, keys, width]
  Scratch<A> query, out, d_query; // [GROUP, width]; `out` is d_out in the backward pass
  Scratch<A> weight, d_weight; // [GROUP, columns]

  Workspace(const Problem<T>& problem, bool backward)
      : width(whole_vectors<A>(problem.E)),
        keys(whole_fours(problem.P + problem.longest)),
        columns(whole_vectors<A>(keys)),
        key(zeros<A>(problem.H * keys * width)),
        value(zeros<A>(problem.H * keys * width)),
        d_key(zeros<A>(backward ? problem.H * keys * width : 0)),
        d_value(zeros<A>(backward ? problem.H * keys * width : 0)),
        query(zeros<A>(GROUP * width)),
        out(zeros<A>(GROUP * width)),
        d_query(zeros<A>(backward ? GROUP * width : 0)),
        weight(zeros<A>(GROUP * columns)),
        d_weight(zeros<A>(backward ? GROUP * columns : 0)) {}
};

template <class T>
SKIPKERNELS_INLINE void load_keys(
    const Problem<T>& problem, Workspace<T>& tile, const Sequence& sequence, int64_t h) {
  const int64_t first = (h * tile.keys + sequence.before) * tile.width;
  const int64_t begin = sequence.begin, length = sequence.length;
  load_rows(&tile.key[first], tile.width, problem.packed.key, begin, h, length, problem.E);
  load_rows(&tile.value[first], tile.width, problem.packed.value, begin, h, length, problem.E);
}

// One sequence, one head.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend(
    const Problem<T>& problem, const Forward<T>& result, Workspace<T>& tile, const Sequence& sequence, int64_t h) {
  const int64_t width = tile.width, head = h * tile.keys * width;
  const TileRows<A> key{&tile.key[head], width}, value{&tile.value[head], width};
  load_keys(problem, tile, sequence, h);
  for (int64_t s = 0; s < sequence.length; s += GROUP) {
    const int64_t token = sequence.begin + s, rows = std::min(GROUP, sequence.length - s);
    const int64_t keys = sequence.before + s + rows;
    load_rows(tile.query.get(), width, problem.packed.query, token, h, rows, problem.E);
    multiply_nt(tile.weight.get(), tile.columns, tile.query.get(), key, rows, whole_fours(keys), width);
    for (int64_t i = 0; i < rows; ++i)
      result.lse[(token + i) * problem.H + h] = softmax_row(
          &tile.weight[i * tile.columns], problem.scale, sequence.before + s + i + 1, whole_vectors<A>(keys));
    const Factor<A> weight{tile.weight.get(), tile.columns, 1};
    multiply<false>(tile.out.get(), weight, value, rows, keys, width);
    store_rows(result.out, token, h, tile.out.get(), width, A(1), rows, problem.E);
  }
}

// Adds to the gradient of keys or values; overwrites the last `fresh` rows.
template <class A>
SKIPKERNELS_INLINE void add_key_gradient(
    A* d_keys, const A* factor, int64_t columns, const A* queries, int64_t keys, int64_t fresh, int64_t rows,
    int64_t width) {
  const Factor<A> transposed{factor, 1, columns};
  const int64_t old = keys - fresh;
  multiply<true>(d_keys, transposed, {queries, width}, old, rows, width);
  multiply<false>(d_keys + old * width, transposed.from(old), {queries, width}, fresh, rows, width);
}

// The gradients of the prefix's own keys and values stay in the tile.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend(
    const Problem<T>& problem, const Backward<T>& result, Workspace<T>& tile, const Sequence& sequence, int64_t h) {
  const int64_t width = tile.width, head = h * tile.keys * width;
  const TileRows<A> key{&tile.key[head], width}, value{&tile.value[head], width};
  load_keys(problem, tile, sequence, h);
  for (int64_t s = 0; s < sequence.length; s += GROUP) {
    const int64_t token = sequence.begin + s, rows = std::min(GROUP, sequence.length - s);
    const int64_t keys = sequence.before + s + rows;
    load_rows(tile.query.get(), width, problem.packed.query, token, h, rows, problem.E);
    load_rows(tile.out.get(), width, result.d_out, token, h, rows, problem.E);
    multiply_nt(tile.weight.get(), tile.columns, tile.query.get(), key, rows, whole_fours(keys), width);
    multiply_nt(tile.d_weight.get(), tile.columns, tile.out.get(), value, rows, whole_fours(keys), width);
    for (int64_t i = 0; i < rows; ++i) {
      A *weight = &tile.weight[i * tile.columns], *d_weight = &tile.d_weight[i * tile.columns];
      const int64_t visible = sequence.before + s + i + 1, end = whole_vectors<A>(keys);
      softmax_row(weight, problem.scale, visible, end);
      score_gradient_row(d_weight, weight, visible, end);
    }
    add_key_gradient(&tile.d_value[head], tile.weight.get(), tile.columns, tile.out.get(), keys, rows, rows, width);
    add_key_gradient(&tile.d_key[head], tile.d_weight.get(), tile.columns, tile.query.get(), keys, rows, rows, width);
    const Factor<A> d_score{tile.d_weight.get(), tile.columns, 1};
    multiply<false>(tile.d_query.get(), d_score, key, rows, keys, width);
    store_rows(result.d_packed.query, token, h, tile.d_query.get(), width, problem.scale, rows, problem.E);
  }
  if (sequence.begin < problem.P)
    return;
  const int64_t own = head + sequence.before * width, begin = sequence.begin, length = sequence.length;
  store_rows(result.d_packed.key, begin, h, &tile.d_key[own], width, problem.scale, length, problem.E);
  store_rows(result.d_packed.value, begin, h, &tile.d_value[own], width, A(1), length, problem.E);
}

// Classes k0 to k1 − 1, in windows of WINDOW tokens; within a window head by head. The prefix goes with class 0.
template <class T, class Result>
SKIPKERNELS_INLINE void attend_classes_body(
    const Problem<T>& problem, const Result& result, Workspace<T>& tile, int64_t k0, int64_t k1) {
  if (k0 == 0)
    for (int64_t h = 0; h < problem.H; ++h)
      attend(problem, result, tile, Sequence{0, problem.P, 0}, h);
  for (int64_t first = k0, last; first < k1; first = last) {
    last = first + 1;
    while (last < k1 && problem.begin(last + 1) - problem.begin(first) <= WINDOW)
      ++last;
    for (int64_t h = 0; h < problem.H; ++h)
      for (int64_t k = first; k < last; ++k) {
        const int64_t begin = problem.begin(k), length = problem.begin(k + 1) - begin;
        attend(problem, result, tile, Sequence{begin, length, problem.P}, h);
      }
  }
}

template <class T>
SKIPKERNELS_INLINE void load_prefix_body(Workspace<T>& tile, const Problem<T>& problem) {
  for (int64_t h = 0; h < problem.H; ++h)
    load_keys(problem, tile, Sequence{0, problem.P, 0}, h);
}

#define DEFINE_LOOPS(T)                                                                                             \
  MULTIVERSION void load_prefix(Workspace<T>& tile, const Problem<T>& problem) {                                    \
    load_prefix_body(tile, problem);                                                                                \
  }                                                                                                                 \
  MULTIVERSION void attend_classes(                                                                                 \
      const Problem<T>& problem, const Forward<T>& result, Workspace<T>& tile, int64_t k0, int64_t k1) {            \
    attend_classes_body(problem, result, tile, k0, k1);                                                             \
  }                                                                                                                 \
  MULTIVERSION void attend_classes(                                                                                 \
      const Problem<T>& problem, const Backward<T>& result, Workspace<T>& tile, int64_t k0, int64_t k1) {           \
    attend_classes_body(problem, result, tile, k0, k1);                                                             \
  }                                                                                                                 \
  MULTIVERSION void store_head(                                                                                     \
      const Tokens<T>& x, int64_t h, const accumulate_t<T>* tile, int64_t width, accumulate_t<T> factor,            \
      int64_t rows, int64_t E) {                                                                                    \
    store_rows(x, 0, h, tile, width, factor, rows, E);                                                              \
  }

DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
DEFINE_LOOPS(BFloat16)
DEFINE_LOOPS(Half)

// Number of tasks that the classes are divided into. It depends on the shape only: sums over classes are bit-equal for
// any number of threads.
template <class T>
int64_t tasks_of(const Problem<T>& problem, int64_t tokens, int64_t products) {
  constexpr double TASK_WORK = 1 << 19; // multiply-adds: about 30 µs, several times the cost of waking a thread
  constexpr double MAX_TASKS = 64; // each has a partial sum of the prefix's gradient
  const double keys = double(problem.P + divide_up(tokens, problem.K)), width = double(problem.H * problem.E);
  const double wanted = double(products) * double(tokens) * keys * width / TASK_WORK;
  return std::clamp<int64_t>(int64_t(std::min(wanted, MAX_TASKS)), 1, problem.K);
}

// Calls f(scratch, task, begin, end) for each task, with its classes begin to end − 1.
template <class T, class F>
void parallel_classes(const Problem<T>& problem, int64_t tasks, bool backward, const F& f) {
  parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    Workspace<T> tile(problem, backward);
    load_prefix(tile, problem);
    for (int64_t task = first; task < last; ++task)
      f(tile, task, task * problem.K / tasks, (task + 1) * problem.K / tasks);
  });
}

// Adds up the partial sums of the tasks, [tasks, H, P, width], and stores the total.
template <class T, class A = accumulate_t<T>>
void store_prefix_gradient(
    const Problem<T>& problem, const Tokens<T>& out, A* sums, int64_t tasks, int64_t width, A factor) {
  const int64_t head = problem.P * width, grain = (1 << 16) / (tasks * head + 1) + 1;
  parallel_for(0, problem.H, grain, [&](int64_t h0, int64_t h1) {
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t task = 1; task < tasks; ++task)
        add(sums + h * head, sums + (task * problem.H + h) * head, head);
      store_head(out, h, sums + h * head, width, factor, problem.P, problem.E);
    }
  });
}

// Packed rows of `parts` widths each.
template <class T>
Tokens<const T> part_of(const Tensor& packed, int64_t part, int64_t parts, int64_t E) {
  const int64_t width = packed.size(1) / parts;
  return {packed.const_data_ptr<T>() + part * width, packed.stride(0), E};
}
template <class T>
Tokens<T> mutable_part_of(Tensor& packed, int64_t part, int64_t parts, int64_t E) {
  const int64_t width = packed.size(1) / parts;
  return {packed.mutable_data_ptr<T>() + part * width, packed.stride(0), E};
}

template <class T>
void zero_from(Tensor& rows, int64_t first) {
  T* data = rows.mutable_data_ptr<T>();
  std::memset(data + first * rows.size(1), 0, size_t((rows.size(0) - first) * rows.size(1)) * sizeof(T));
}

// skipkernels.functional validates the inputs; these checks keep direct calls from accessing memory out of bounds.
struct Inputs {
  Tensor packed; // with a contiguous last dimension
  std::vector<int64_t> offsets; // empty: all suffixes have one length
  int64_t H, E, P, K, longest;
  int64_t end; // rows of the prefix and of the suffixes; rows behind them are zero

  Inputs(
      const Tensor& packed_, int64_t heads, int64_t prefix_length, const std::optional<Tensor>& offsets_,
      int64_t max_length)
      : packed(with_contiguous_rows(packed_)), H(heads), P(prefix_length), longest(max_length) {
    STD_TORCH_CHECK(
        packed.dim() == 2 && packed.numel() > 0 && H > 0 && H <= packed.size(1) && packed.size(1) % (3 * H) == 0, NAME,
        ": packed must be [R, 3W] with R and W at least 1, and heads must divide W.");
    const int64_t tokens = packed.size(0) - P;
    E = packed.size(1) / (3 * H);
    end = packed.size(0);
    STD_TORCH_CHECK(P >= 0 && tokens > 0, NAME, ": prefix_length must be 0 to R - 1.");
    STD_TORCH_CHECK(max_length > 0, NAME, ": max_length must be at least 1.");
    if (!offsets_) {
      STD_TORCH_CHECK(tokens % max_length == 0, NAME, ": max_length must divide the rows behind the prefix.");
      K = tokens / max_length;
      return;
    }
    STD_TORCH_CHECK(
        offsets_->dim() == 1 && offsets_->size(0) > 1 && offsets_->scalar_type() == ScalarType::Long, NAME,
        ": offsets must be int64 [K + 1].");
    offsets = integers(*offsets_);
    K = int64_t(offsets.size()) - 1;
    const auto [least, most] = std::minmax_element(offsets.begin(), offsets.end()); // so that no difference overflows
    STD_TORCH_CHECK(
        offsets[0] == 0 && *least >= 0 && *most <= tokens, NAME, ": offsets must go from 0 to at most ", tokens, ".");
    longest = 1; // max_length may be larger; scratch is sized by the longest suffix
    for (int64_t k = 0; k < K; ++k) {
      const int64_t length = offsets[k + 1] - offsets[k];
      STD_TORCH_CHECK(length >= 0 && length <= max_length, NAME, ": offsets must rise by 0 to max_length.");
      longest = std::max(longest, length);
    }
    end = P + offsets[K];
  }

  template <class T>
  Problem<T> problem(double scale) const {
    return {
        K,
        H,
        E,
        P,
        longest,
        accumulate_t<T>(scale),
        offsets.empty() ? nullptr : offsets.data(),
        {part_of<T>(packed, 0, 3, E), part_of<T>(packed, 1, 3, E), part_of<T>(packed, 2, 3, E)}};
  }
};

std::tuple<Tensor, Tensor> shared_prefix_attention(
    const Tensor& packed, int64_t heads, int64_t prefix_length, const std::optional<Tensor>& offsets,
    int64_t max_length, double scale) {
  const Inputs inputs(packed, heads, prefix_length, offsets, max_length);
  Tensor out = make_empty({packed.size(0), inputs.H * inputs.E}, packed.scalar_type());
  Tensor lse = make_empty({packed.size(0), inputs.H}, ScalarType::Double);
  zero_from<double>(lse, inputs.end);
  dispatch_features(packed, NAME, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = inputs.problem<T>(scale);
    const Forward<T> result{mutable_part_of<T>(out, 0, 1, inputs.E), lse.mutable_data_ptr<double>()};
    zero_from<T>(out, inputs.end);
    parallel_classes(
        problem, tasks_of(problem, inputs.end - inputs.P, 2), false,
        [&](Workspace<T>& tile, int64_t, int64_t k0, int64_t k1) { attend_classes(problem, result, tile, k0, k1); });
  });
  return {out, lse};
}

// lse is not read (the Triton kernel reads it): the scores of a row and its softmax are recomputed in full.
Tensor shared_prefix_attention_backward(
    const Tensor& d_out, const Tensor& packed, const Tensor& /*lse*/, int64_t heads, int64_t prefix_length,
    const std::optional<Tensor>& offsets, int64_t max_length, double scale) {
  const Inputs inputs(packed, heads, prefix_length, offsets, max_length);
  const int64_t R = packed.size(0), E = inputs.E;
  STD_TORCH_CHECK(
      d_out.dim() == 2 && d_out.size(0) == R && d_out.size(1) == inputs.H * E &&
          d_out.scalar_type() == packed.scalar_type(),
      NAME, ": d_out must be [R, W] in the dtype of packed.");
  const Tensor d_out_rows = with_contiguous_rows(d_out);
  Tensor d_packed = make_empty({R, packed.size(1)}, packed.scalar_type());
  dispatch_features(packed, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem = inputs.problem<T>(scale);
    const Projections<T> gradients{
        mutable_part_of<T>(d_packed, 0, 3, E), mutable_part_of<T>(d_packed, 1, 3, E),
        mutable_part_of<T>(d_packed, 2, 3, E)};
    const Backward<T> result{part_of<T>(d_out_rows, 0, 1, E), gradients};
    zero_from<T>(d_packed, inputs.end);
    const int64_t tasks = tasks_of(problem, inputs.end - inputs.P, 5), width = whole_vectors<A>(E);
    const int64_t head = problem.P * width, sum = problem.H * head;
    const auto key_sums = scratch<A>(tasks * sum), value_sums = scratch<A>(tasks * sum);
    parallel_classes(problem, tasks, true, [&](Workspace<T>& tile, int64_t task, int64_t k0, int64_t k1) {
      for (int64_t h = 0; h < problem.H; ++h) {
        A *d_key = &tile.d_key[h * tile.keys * width], *d_value = &tile.d_value[h * tile.keys * width];
        std::fill(d_key, d_key + head, A(0));
        std::fill(d_value, d_value + head, A(0));
      }
      attend_classes(problem, result, tile, k0, k1);
      for (int64_t h = 0; h < problem.H; ++h) {
        const A *d_key = &tile.d_key[h * tile.keys * width], *d_value = &tile.d_value[h * tile.keys * width];
        std::copy(d_key, d_key + head, &key_sums[task * sum + h * head]);
        std::copy(d_value, d_value + head, &value_sums[task * sum + h * head]);
      }
    });
    store_prefix_gradient(problem, gradients.key, key_sums.get(), tasks, width, A(scale));
    store_prefix_gradient(problem, gradients.value, value_sums.get(), tasks, width, A(1));
  });
  return d_packed;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("shared_prefix_attention", TORCH_BOX(&shared_prefix_attention));
  m.impl("shared_prefix_attention_backward", TORCH_BOX(&shared_prefix_attention_backward));
}

} // namespace skipkernels
