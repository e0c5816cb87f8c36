// suffix_attention: causal attention of many short class suffixes over one prefix that they share, and over themselves.
//
//   weight_ij = exp(scale · ⟨q_i, k_j⟩ − lse_i),   j over the prefix and over the tokens of i's suffix up to i itself
//   out_i = Σ_j weight_ij v_j
//   d_weight_ij = ⟨d_out_i, v_j⟩,   d_score_ij = weight_ij (d_weight_ij − Σ_j weight_ij d_weight_ij)
//   d_q_i = scale Σ_j d_score_ij k_j,   d_k_j = scale Σ_i d_score_ij q_i,   d_v_j = Σ_i weight_ij d_out_i
//
// Map: a task computes a block of classes. For each head its scratch contains the keys and values of the prefix,
// followed by those of one suffix, so that a class is a small attention over one tile of keys. Backward stores the
// gradients of that tile in the same layout; the gradient of the prefix is summed over the classes of a task, then over
// tasks.
#include "attention.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "suffix_attention";
constexpr int64_t GROUP = 8; // queries per product: small, so that few masked keys are multiplied
constexpr int64_t WINDOW = 32; // tokens that are computed for one head before the next head

// Products with keys are fastest in groups of four; surplus keys of a tile are masked like future keys.
constexpr int64_t whole_fours(int64_t keys) {
  return (keys + 3) / 4 * 4;
}

template <class T>
struct Problem {
  int64_t K, H, E, P, longest;
  accumulate_t<T> scale;
  const int64_t* offsets; // start of each suffix, and the end; null if all have one length
  Tokens<const T> query, prefix_key, prefix_value, suffix_key, suffix_value;

  int64_t begin(int64_t k) const {
    return offsets == nullptr ? k * longest : offsets[k];
  }
};

template <class T>
struct Forward {
  Tokens<T> out;
  double* lse; // [tokens, H]
};

template <class T>
struct Backward {
  Tokens<const T> d_out;
  Tokens<T> d_query, d_suffix_key, d_suffix_value; // data is null if not needed
  bool need_key, need_value; // of the prefix or of the suffix
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
SKIPKERNELS_INLINE void load_suffix(
    const Problem<T>& problem, Workspace<T>& tile, int64_t begin, int64_t length, int64_t h) {
  const int64_t behind_prefix = (h * tile.keys + problem.P) * tile.width;
  load_rows(&tile.key[behind_prefix], tile.width, problem.suffix_key, begin, h, length, problem.E);
  load_rows(&tile.value[behind_prefix], tile.width, problem.suffix_value, begin, h, length, problem.E);
}

// One class, one head.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend(
    const Problem<T>& problem, const Forward<T>& result, Workspace<T>& tile, int64_t begin, int64_t length, int64_t h) {
  const int64_t width = tile.width, head = h * tile.keys * width;
  const TileRows<A> key{&tile.key[head], width}, value{&tile.value[head], width};
  load_suffix(problem, tile, begin, length, h);
  for (int64_t s = 0; s < length; s += GROUP) {
    const int64_t token = begin + s, rows = std::min(GROUP, length - s), keys = problem.P + s + rows;
    load_rows(tile.query.get(), width, problem.query, token, h, rows, problem.E);
    multiply_nt(tile.weight.get(), tile.columns, tile.query.get(), key, rows, whole_fours(keys), width);
    for (int64_t i = 0; i < rows; ++i)
      result.lse[(token + i) * problem.H + h] = softmax_row(
          &tile.weight[i * tile.columns], problem.scale, problem.P + s + i + 1, whole_vectors<A>(keys));
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

template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend_backward(
    const Problem<T>& problem, const Backward<T>& result, Workspace<T>& tile, int64_t begin, int64_t length,
    int64_t h) {
  const int64_t width = tile.width, head = h * tile.keys * width, suffix = head + problem.P * width;
  const TileRows<A> key{&tile.key[head], width}, value{&tile.value[head], width};
  load_suffix(problem, tile, begin, length, h);
  for (int64_t s = 0; s < length; s += GROUP) {
    const int64_t token = begin + s, rows = std::min(GROUP, length - s), keys = problem.P + s + rows;
    load_rows(tile.query.get(), width, problem.query, token, h, rows, problem.E);
    load_rows(tile.out.get(), width, result.d_out, token, h, rows, problem.E);
    multiply_nt(tile.weight.get(), tile.columns, tile.query.get(), key, rows, whole_fours(keys), width);
    multiply_nt(tile.d_weight.get(), tile.columns, tile.out.get(), value, rows, whole_fours(keys), width);
    for (int64_t i = 0; i < rows; ++i) {
      A *weight = &tile.weight[i * tile.columns], *d_weight = &tile.d_weight[i * tile.columns];
      const int64_t visible = problem.P + s + i + 1, end = whole_vectors<A>(keys);
      softmax_row(weight, problem.scale, visible, end);
      score_gradient_row(d_weight, weight, visible, end);
    }
    if (result.need_value)
      add_key_gradient(
          &tile.d_value[head], tile.weight.get(), tile.columns, tile.out.get(), keys, rows, rows, width);
    if (result.need_key)
      add_key_gradient(
          &tile.d_key[head], tile.d_weight.get(), tile.columns, tile.query.get(), keys, rows, rows, width);
    if (result.d_query.data != nullptr) {
      const Factor<A> d_score{tile.d_weight.get(), tile.columns, 1};
      multiply<false>(tile.d_query.get(), d_score, key, rows, keys, width);
      store_rows(result.d_query, token, h, tile.d_query.get(), width, problem.scale, rows, problem.E);
    }
  }
  if (result.d_suffix_key.data != nullptr)
    store_rows(result.d_suffix_key, begin, h, &tile.d_key[suffix], width, problem.scale, length, problem.E);
  if (result.d_suffix_value.data != nullptr)
    store_rows(result.d_suffix_value, begin, h, &tile.d_value[suffix], width, A(1), length, problem.E);
}

// Classes k0 to k1 − 1, in windows of WINDOW tokens; within a window head by head.
template <class T, class Result>
SKIPKERNELS_INLINE void attend_classes_body(
    const Problem<T>& problem, const Result& result, Workspace<T>& tile, int64_t k0, int64_t k1) {
  for (int64_t first = k0, last; first < k1; first = last) {
    last = first + 1;
    while (last < k1 && problem.begin(last + 1) - problem.begin(first) <= WINDOW)
      ++last;
    for (int64_t h = 0; h < problem.H; ++h)
      for (int64_t k = first; k < last; ++k) {
        const int64_t begin = problem.begin(k), length = problem.begin(k + 1) - begin;
        if constexpr (std::is_same_v<Result, Forward<T>>)
          attend(problem, result, tile, begin, length, h);
        else
          attend_backward(problem, result, tile, begin, length, h);
      }
  }
}

template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void load_prefix_body(Workspace<T>& tile, const Problem<T>& problem) {
  for (int64_t h = 0; h < problem.H; ++h) {
    const int64_t head = h * tile.keys * tile.width;
    load_rows(&tile.key[head], tile.width, problem.prefix_key, 0, h, problem.P, problem.E);
    load_rows(&tile.value[head], tile.width, problem.prefix_value, 0, h, problem.P, problem.E);
  }
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
    const Problem<T>& problem, Tensor& d_prefix, A* sums, int64_t tasks, int64_t width, A factor) {
  const Tokens<T> out = mutable_tokens_of<T>(d_prefix);
  const int64_t head = problem.P * width, grain = std::max<int64_t>(1, (1 << 16) / (tasks * head));
  parallel_for(0, problem.H, grain, [&](int64_t h0, int64_t h1) {
    for (int64_t h = h0; h < h1; ++h) {
      for (int64_t task = 1; task < tasks; ++task)
        add(sums + h * head, sums + (task * problem.H + h) * head, head);
      store_head(out, h, sums + h * head, width, factor, problem.P, problem.E);
    }
  });
}

// Inputs with a contiguous last dimension. skipkernels.functional validates the inputs; these checks keep direct calls
// from accessing memory out of bounds.
struct Inputs {
  Tensor query, prefix_key, prefix_value, suffix_key, suffix_value;
  std::vector<int64_t> offsets; // empty: all suffixes have one length
  int64_t K, longest;

  Inputs(
      const Tensor& query_, const Tensor& prefix_key_, const Tensor& prefix_value_, const Tensor& suffix_key_,
      const Tensor& suffix_value_, const std::optional<Tensor>& offsets_, int64_t max_length)
      : query(with_contiguous_heads(query_)),
        prefix_key(with_contiguous_heads(prefix_key_)),
        prefix_value(with_contiguous_heads(prefix_value_)),
        suffix_key(with_contiguous_heads(suffix_key_)),
        suffix_value(with_contiguous_heads(suffix_value_)),
        longest(max_length) {
    const auto like_query = [&](const Tensor& x, int64_t tokens) {
      return x.dim() == 3 && x.size(0) == tokens && x.size(1) == query.size(1) && x.size(2) == query.size(2) &&
             x.scalar_type() == query.scalar_type();
    };
    STD_TORCH_CHECK(
        query.dim() == 3 && query.numel() > 0, NAME, ": query must be [T, H, E] with T, H and E at least 1.");
    const int64_t tokens = query.size(0);
    STD_TORCH_CHECK(
        prefix_key.dim() == 3 && like_query(prefix_key, prefix_key.size(0)) &&
            like_query(prefix_value, prefix_key.size(0)) && prefix_key.size(0) > 0,
        NAME, ": prefix_key and prefix_value must be [P, H, E] with P at least 1.");
    STD_TORCH_CHECK(
        like_query(suffix_key, tokens) && like_query(suffix_value, tokens), NAME,
        ": suffix_key and suffix_value must be [T, H, E].");
    STD_TORCH_CHECK(max_length > 0, NAME, ": max_length must be at least 1.");
    if (!offsets_) {
      STD_TORCH_CHECK(tokens % max_length == 0, NAME, ": T must be a multiple of max_length where offsets are none.");
      K = tokens / max_length;
      return;
    }
    STD_TORCH_CHECK(
        offsets_->dim() == 1 && offsets_->size(0) > 1 && offsets_->scalar_type() == ScalarType::Long, NAME,
        ": offsets must be int64 [K + 1].");
    offsets = integers(*offsets_);
    K = int64_t(offsets.size()) - 1;
    if (offsets[0] != 0 || offsets[K] != tokens)
      refuse(
          NAME, ": offsets must go from 0 to ", tokens, ", the tokens of query; got ", offsets[0], " to ", offsets[K],
          ".");
    longest = 1; // max_length may be larger; scratch is sized by the longest suffix
    for (int64_t k = 0; k < K; ++k) {
      const int64_t length = offsets[k + 1] - offsets[k];
      if (length < 0 || length > max_length)
        refuse(
            NAME, ": offsets must rise by 0 to max_length (", max_length, "); got a suffix of ", length, " tokens.");
      longest = std::max(longest, length);
    }
  }

  template <class T>
  Problem<T> problem(double scale) const {
    return {
        K,
        query.size(1),
        query.size(2),
        prefix_key.size(0),
        longest,
        accumulate_t<T>(scale),
        offsets.empty() ? nullptr : offsets.data(),
        tokens_of<T>(query),
        tokens_of<T>(prefix_key),
        tokens_of<T>(prefix_value),
        tokens_of<T>(suffix_key),
        tokens_of<T>(suffix_value)};
  }
};

std::tuple<Tensor, Tensor> suffix_attention(
    const Tensor& query, const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& suffix_key,
    const Tensor& suffix_value, const std::optional<Tensor>& offsets, int64_t max_length, double scale) {
  const Inputs inputs(query, prefix_key, prefix_value, suffix_key, suffix_value, offsets, max_length);
  const int64_t tokens = query.size(0), H = query.size(1);
  Tensor out = make_empty({tokens, H, query.size(2)}, query.scalar_type());
  Tensor lse = make_empty({tokens, H}, ScalarType::Double);
  dispatch_features(query, NAME, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = inputs.problem<T>(scale);
    const Forward<T> result{mutable_tokens_of<T>(out), lse.mutable_data_ptr<double>()};
    parallel_classes(
        problem, tasks_of(problem, tokens, 2), false,
        [&](Workspace<T>& tile, int64_t, int64_t k0, int64_t k1) { attend_classes(problem, result, tile, k0, k1); });
  });
  return {out, lse};
}

// out and lse are not read (the Triton kernel reads them): the scores of a row and its softmax are recomputed in full.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> suffix_attention_backward(
    const Tensor& d_out, const Tensor& query, const Tensor& prefix_key, const Tensor& prefix_value,
    const Tensor& suffix_key, const Tensor& suffix_value, const Tensor& /*out*/, const Tensor& /*lse*/,
    const std::optional<Tensor>& offsets, int64_t max_length, double scale, bool need_query, bool need_prefix_key,
    bool need_prefix_value, bool need_suffix_key, bool need_suffix_value) {
  const Inputs inputs(query, prefix_key, prefix_value, suffix_key, suffix_value, offsets, max_length);
  STD_TORCH_CHECK(
      d_out.dim() == 3 && d_out.size(0) == query.size(0) && d_out.size(1) == query.size(1) &&
          d_out.size(2) == query.size(2) && d_out.scalar_type() == query.scalar_type(),
      NAME, ": d_out must be like query.");
  const Tensor d_out_rows = with_contiguous_heads(d_out);
  Tensor d_query = empty_if(need_query, query);
  Tensor d_prefix_key = empty_if(need_prefix_key, prefix_key), d_suffix_key = empty_if(need_suffix_key, suffix_key);
  Tensor d_prefix_value = empty_if(need_prefix_value, prefix_value);
  Tensor d_suffix_value = empty_if(need_suffix_value, suffix_value);
  dispatch_features(query, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem = inputs.problem<T>(scale);
    const Backward<T> result{
        tokens_of<T>(d_out_rows),
        tokens_if<T>(need_query, d_query),
        tokens_if<T>(need_suffix_key, d_suffix_key),
        tokens_if<T>(need_suffix_value, d_suffix_value),
        need_prefix_key || need_suffix_key,
        need_prefix_value || need_suffix_value};
    const int64_t tasks = tasks_of(problem, query.size(0), 5), width = whole_vectors<A>(problem.E);
    const int64_t head = problem.P * width, sum = problem.H * head;
    const auto key_sums = scratch<A>(need_prefix_key ? tasks * sum : 0);
    const auto value_sums = scratch<A>(need_prefix_value ? tasks * sum : 0);
    parallel_classes(problem, tasks, true, [&](Workspace<T>& tile, int64_t task, int64_t k0, int64_t k1) {
      for (int64_t h = 0; h < problem.H; ++h) {
        A *d_key = &tile.d_key[h * tile.keys * width], *d_value = &tile.d_value[h * tile.keys * width];
        std::fill(d_key, d_key + head, A(0));
        std::fill(d_value, d_value + head, A(0));
      }
      attend_classes(problem, result, tile, k0, k1);
      for (int64_t h = 0; h < problem.H; ++h) {
        const A *d_key = &tile.d_key[h * tile.keys * width], *d_value = &tile.d_value[h * tile.keys * width];
        if (need_prefix_key)
          std::copy(d_key, d_key + head, &key_sums[task * sum + h * head]);
        if (need_prefix_value)
          std::copy(d_value, d_value + head, &value_sums[task * sum + h * head]);
      }
    });
    if (need_prefix_key)
      store_prefix_gradient(problem, d_prefix_key, key_sums.get(), tasks, width, A(scale));
    if (need_prefix_value)
      store_prefix_gradient(problem, d_prefix_value, value_sums.get(), tasks, width, A(1));
  });
  return {d_query, d_prefix_key, d_prefix_value, d_suffix_key, d_suffix_value};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("suffix_attention", TORCH_BOX(&suffix_attention));
  m.impl("suffix_attention_backward", TORCH_BOX(&suffix_attention_backward));
}

} // namespace skipkernels
