// pooled_attention: one query per sequence, that of the pooled token, against all keys of the sequence.
//
//   weight_n = exp(scale · ⟨q, k_n⟩ − lse)
//   out = Σ_n weight_n v_n
//   d_weight_n = ⟨d_out, v_n⟩,   d_score_n = weight_n (d_weight_n − Σ_n weight_n d_weight_n)
//   d_q = scale Σ_n d_score_n k_n,   d_k_n = scale d_score_n q,   d_v_n = weight_n d_out
//
// Map: a task computes some heads of one sequence. It reads the keys in blocks, and within a block head by head: the
// heads of a token are adjacent, so memory is read in long runs. Forward: all scores, softmax, then all values.
// Backward: all weights and their gradients, then the keys again. Nothing is summed across tasks.
#include "attention.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "pooled_attention";
constexpr int64_t BLOCK = 32; // keys: a head's tile of 32 × 64 fp32 is 8 KiB

template <class T>
struct Problem {
  int64_t B, N, H, E;
  accumulate_t<T> scale;
  Tokens<const T> query; // [B, H, E]
  Tokens<const T> key, value; // of the first sequence
  int64_t stride_key, stride_value; // from a sequence to the next

  Tokens<const T> keys(int64_t b) const {
    return {key.data + b * stride_key, key.stride_token, key.stride_head};
  }
  Tokens<const T> values(int64_t b) const {
    return {value.data + b * stride_value, value.stride_token, value.stride_head};
  }
};

template <class T>
struct Forward {
  Tokens<T> out; // [B, H, E]
  double* lse; // [B, H]
};

template <class T>
struct Backward {
  Tokens<const T> d_out; // [B, H, E]
  Tokens<T> d_query; // [B, H, E]; data is null if not needed, as in the next two
  Tokens<T> d_key, d_value; // [B · N, H, E]
};

// Scratch of a thread, for `heads` heads.
template <class T>
struct Workspace {
  using A = accumulate_t<T>;

  int64_t width, columns;
  Scratch<A> tile; // [BLOCK, width], keys or values
  Scratch<A> query, out; // [heads, width]; d_query and d_out in the backward pass
  Scratch<A> d_query;
  Scratch<A> weight, d_weight; // [heads, columns]

  Workspace(const Problem<T>& problem, int64_t heads, bool backward)
      : width(whole_vectors<A>(problem.E)),
        columns(whole_vectors<A>(problem.N)),
        tile(zeros<A>(BLOCK * width)),
        query(zeros<A>(heads * width)),
        out(zeros<A>(heads * width)),
        d_query(zeros<A>(backward ? heads * width : 0)),
        weight(zeros<A>(heads * columns)),
        d_weight(zeros<A>(backward ? heads * columns : 0)) {}
};

// One head of `count` tokens from n on: the tensor itself if its layout allows, else a copy in the tile.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE TileRows<A> rows_at(
    const Tokens<const T>& tokens, Workspace<T>& workspace, int64_t n, int64_t h, int64_t count, int64_t E) {
  if constexpr (std::is_same_v<T, A>)
    if (E == workspace.width)
      return {tokens.at(n, h), tokens.stride_token};
  load_rows(workspace.tile.get(), workspace.width, tokens, n, h, count, E);
  return {workspace.tile.get(), workspace.width};
}

// out[h, n] = ⟨rows_h, keys_nh⟩ for heads h0 to h1 and all keys.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void multiply_keys(
    A* out, const A* rows, const Tokens<const T>& keys, Workspace<T>& workspace, int64_t length, int64_t h0, int64_t h1,
    int64_t E) {
  const int64_t width = workspace.width;
  for (int64_t n = 0; n < length; n += BLOCK) {
    const int64_t count = std::min(BLOCK, length - n);
    for (int64_t h = h0; h < h1; ++h) {
      const TileRows<A> key = rows_at(keys, workspace, n, h, count, E);
      multiply_nt(out + (h - h0) * workspace.columns + n, 0, rows + (h - h0) * width, key, 1, count, width);
    }
  }
}

// out[h] += Σ_n factor[h, n] · rows_nh for heads h0 to h1 and `count` tokens from n on.
template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void add_weighted(
    A* out, const A* factor, const Tokens<const T>& rows, Workspace<T>& workspace, int64_t n, int64_t count, int64_t h0,
    int64_t h1, int64_t E) {
  const int64_t width = workspace.width;
  for (int64_t h = h0; h < h1; ++h) {
    const Factor<A> weights{factor + (h - h0) * workspace.columns + n, 0, 1};
    multiply<true>(out + (h - h0) * width, weights, rows_at(rows, workspace, n, h, count, E), 1, count, width);
  }
}

template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend_body(
    const Problem<T>& problem, const Forward<T>& result, Workspace<T>& workspace, int64_t b, int64_t h0, int64_t h1) {
  const int64_t N = problem.N, width = workspace.width;
  A *out = workspace.out.get(), *weight = workspace.weight.get();
  load_heads(workspace.query.get(), width, problem.query, b, h0, h1, problem.E);
  multiply_keys(weight, workspace.query.get(), problem.keys(b), workspace, N, h0, h1, problem.E);
  for (int64_t h = h0; h < h1; ++h)
    result.lse[b * problem.H + h] =
        softmax_row(weight + (h - h0) * workspace.columns, problem.scale, N, whole_vectors<A>(N));
  std::fill(out, out + (h1 - h0) * width, A(0));
  for (int64_t n = 0; n < N; n += BLOCK)
    add_weighted(out, weight, problem.values(b), workspace, n, std::min(BLOCK, N - n), h0, h1, problem.E);
  for (int64_t h = h0; h < h1; ++h)
    store_rows(result.out, b, h, out + (h - h0) * width, width, A(1), 1, problem.E);
}

template <class T, class A = accumulate_t<T>>
SKIPKERNELS_INLINE void attend_body(
    const Problem<T>& problem, const Backward<T>& result, Workspace<T>& workspace, int64_t b, int64_t h0, int64_t h1) {
  const int64_t N = problem.N, width = workspace.width, columns = workspace.columns;
  A *query = workspace.query.get(), *d_out = workspace.out.get(), *d_query = workspace.d_query.get();
  A *weight = workspace.weight.get(), *d_weight = workspace.d_weight.get();
  const bool need_scores = result.d_query.data != nullptr || result.d_key.data != nullptr;
  load_heads(query, width, problem.query, b, h0, h1, problem.E);
  load_heads(d_out, width, result.d_out, b, h0, h1, problem.E);
  multiply_keys(weight, query, problem.keys(b), workspace, N, h0, h1, problem.E);
  if (need_scores)
    multiply_keys(d_weight, d_out, problem.values(b), workspace, N, h0, h1, problem.E);
  for (int64_t h = h0; h < h1; ++h) {
    const int64_t row = (h - h0) * columns, end = whole_vectors<A>(N);
    softmax_row(weight + row, problem.scale, N, end);
    if (need_scores)
      score_gradient_row(d_weight + row, weight + row, N, end);
  }
  std::fill(d_query, d_query + (h1 - h0) * width, A(0));
  for (int64_t n = 0; n < N; n += BLOCK) {
    const int64_t count = std::min(BLOCK, N - n);
    if (result.d_query.data != nullptr)
      add_weighted(d_query, d_weight, problem.keys(b), workspace, n, count, h0, h1, problem.E);
    for (int64_t i = n; i < n + count; ++i)
      for (int64_t h = h0; h < h1; ++h) {
        const int64_t at = (h - h0) * columns + i;
        if (result.d_key.data != nullptr)
          store_rows(
              result.d_key, b * N + i, h, query + (h - h0) * width, width, problem.scale * d_weight[at], 1,
              problem.E);
        if (result.d_value.data != nullptr)
          store_rows(
              result.d_value, b * N + i, h, d_out + (h - h0) * width, width, weight[at], 1, problem.E);
      }
  }
  for (int64_t h = h0; h < h1 && result.d_query.data != nullptr; ++h)
    store_rows(result.d_query, b, h, d_query + (h - h0) * width, width, problem.scale, 1, problem.E);
}

// Heads h0 to h1 of sequence b.
#define DEFINE_LOOPS(T)                                                                                               \
  MULTIVERSION void attend(                                                                                           \
      const Problem<T>& problem, const Forward<T>& result, Workspace<T>& workspace, int64_t b, int64_t h0,            \
      int64_t h1) {                                                                                                   \
    attend_body(problem, result, workspace, b, h0, h1);                                                               \
  }                                                                                                                   \
  MULTIVERSION void attend(                                                                                           \
      const Problem<T>& problem, const Backward<T>& result, Workspace<T>& workspace, int64_t b, int64_t h0,           \
      int64_t h1) {                                                                                                   \
    attend_body(problem, result, workspace, b, h0, h1);                                                               \
  }

DEFINE_LOOPS(float)
DEFINE_LOOPS(double)
DEFINE_LOOPS(BFloat16)
DEFINE_LOOPS(Half)

template <class T, class Result>
void attend_all(const Problem<T>& problem, const Result& result) {
  constexpr int64_t TASK_WORK = 1 << 16; // elements of keys: about 20 µs, several times the cost of waking a thread
  const int64_t head = problem.N * problem.E;
  const int64_t parts = divide_up(problem.H, std::clamp<int64_t>(TASK_WORK / head, 1, problem.H));
  const int64_t heads = divide_up(problem.H, parts), grain = std::max<int64_t>(1, TASK_WORK / (head * heads));
  parallel_for(0, problem.B * parts, grain, [&](int64_t first, int64_t last) {
    Workspace<T> workspace(problem, heads, std::is_same_v<Result, Backward<T>>);
    for (int64_t task = first; task < last; ++task) {
      const int64_t h = task % parts * heads;
      attend(problem, result, workspace, task / parts, h, std::min(h + heads, problem.H));
    }
  });
}

// Inputs with a contiguous last dimension. skipkernels.functional validates the inputs; these checks keep direct calls
// from accessing memory out of bounds.
struct Inputs {
  Tensor query, key, value;

  Inputs(const Tensor& query_, const Tensor& key_, const Tensor& value_)
      : query(with_contiguous_rows(query_)), key(with_contiguous_rows(key_)), value(with_contiguous_rows(value_)) {
    STD_TORCH_CHECK(
        query.dim() == 3 && query.numel() > 0, NAME, ": query must be [B, H, E] with B, H and E at least 1.");
    for (const Tensor& x : {key, value})
      STD_TORCH_CHECK(
          x.dim() == 4 && x.size(0) == query.size(0) && x.size(1) == key.size(1) && x.size(2) == query.size(1) &&
              x.size(3) == query.size(2) && x.numel() > 0 && x.scalar_type() == query.scalar_type(),
          NAME, ": key and value must be [B, N, H, E] with N at least 1, in the dtype of query.");
  }

  template <class T>
  Problem<T> problem(double scale) const {
    return {
        query.size(0),
        key.size(1),
        query.size(1),
        query.size(2),
        accumulate_t<T>(scale),
        tokens_of<T>(query),
        tokens_of<T>(key),
        tokens_of<T>(value),
        key.stride(0),
        value.stride(0)};
  }
};

std::tuple<Tensor, Tensor> pooled_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  const Inputs inputs(query, key, value);
  Tensor out = make_empty({query.size(0), query.size(1), query.size(2)}, query.scalar_type());
  Tensor lse = make_empty({query.size(0), query.size(1)}, ScalarType::Double);
  dispatch_features(query, NAME, [&](auto type) {
    using T = decltype(type);
    attend_all(inputs.problem<T>(scale), Forward<T>{mutable_tokens_of<T>(out), lse.mutable_data_ptr<double>()});
  });
  return {out, lse};
}

// lse is not read (the Triton kernel reads it): the scores of a row and its softmax are recomputed in full.
std::tuple<Tensor, Tensor, Tensor> pooled_attention_backward(
    const Tensor& d_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& /*lse*/,
    double scale, bool need_query, bool need_key, bool need_value) {
  const Inputs inputs(query, key, value);
  STD_TORCH_CHECK(
      d_out.dim() == 3 && d_out.size(0) == query.size(0) && d_out.size(1) == query.size(1) &&
          d_out.size(2) == query.size(2) && d_out.scalar_type() == query.scalar_type(),
      NAME, ": d_out must be like query.");
  const Tensor d_out_rows = with_contiguous_rows(d_out);
  Tensor d_query = empty_if(need_query, query), d_key = empty_if(need_key, key), d_value = empty_if(need_value, value);
  dispatch_features(query, NAME, [&](auto type) {
    using T = decltype(type);
    attend_all(
        inputs.problem<T>(scale),
        Backward<T>{
            tokens_of<T>(d_out_rows), tokens_if<T>(need_query, d_query),
            tokens_if<T>(need_key, d_key), tokens_if<T>(need_value, d_value)});
  });
  return {d_query, d_key, d_value};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("pooled_attention", TORCH_BOX(&pooled_attention));
  m.impl("pooled_attention_backward", TORCH_BOX(&pooled_attention_backward));
}

} // namespace skipkernels
