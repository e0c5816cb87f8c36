// Shared by the operators on rows of features: division of [..., W] into blocks of rows, and sums over all rows.
#pragma once

#include "tensor.h"

namespace skipkernels {

inline bool same_sizes(const Tensor& x, const Tensor& other) {
  bool same = other.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i)
    same = other.size(i) == x.size(i);
  return same;
}

// Rows of W numbers of any type, read and written through a buffer in the type of arithmetic.
template <class A>
class ConvertedRows {
 public:
  ConvertedRows(const Tensor& rows, int64_t W) : rows_(rows), W_(W) {}

  // Row r: the row itself if it has the type A, else its copy in the buffer.
  const A* load(int64_t r, A* buffer) const {
    const A* row = buffer;
    dispatch_features(rows_, "skipkernels", [&](auto type) {
      using T = decltype(type);
      const T* data = rows_.const_data_ptr<T>() + r * W_;
      if constexpr (std::is_same_v<T, A>)
        row = data;
      else
        convert_row(buffer, data, W_);
    });
    return row;
  }
  // Memory for row r: the row itself if it has the type A, else the buffer; to be followed by `store`.
  A* destination(int64_t r, A* buffer) {
    return rows_.scalar_type() == scalar_type_of<A> ? rows_.mutable_data_ptr<A>() + r * W_ : buffer;
  }
  void store(int64_t r, const A* buffer) {
    dispatch_features(rows_, "skipkernels", [&](auto type) {
      using T = decltype(type);
      T* row = rows_.mutable_data_ptr<T>() + r * W_;
      if constexpr (!std::is_same_v<T, A>)
        convert_row(row, buffer, W_);
      else if (row != buffer)
        std::copy(buffer, buffer + W_, row);
    });
  }

 private:
  Tensor rows_;
  int64_t W_;
};

// A vector in the type of arithmetic, in the order in which loops over rows of T load it (simd.h, slot), padded with
// zeros.
template <class T>
class Slots {
 public:
  using A = accumulate_t<T>;

  // W numbers of a vector from `first` on. Without a vector: zeros.
  Slots(const std::optional<Tensor>& vector, int64_t W, int64_t first = 0)
      : slots_(scratch<A>(slots<T>(W))) {
    std::fill(&slots_[0], &slots_[slots<T>(W)], A(0));
    if (!vector)
      return;
    const int64_t stride = vector->stride(0);
    dispatch_features(*vector, "skipkernels", [&](auto type) {
      const auto* data = vector->template const_data_ptr<decltype(type)>();
      for (int64_t i = 0; i < W; ++i) {
        const A number = A(widen(data[(first + i) * stride]));
        slots_[slot<T>(i)] = std::isnan(number) ? std::numeric_limits<A>::quiet_NaN() : number; // see round_to_bfloat16
      }
    });
  }
  operator const A*() const {
    return slots_.get();
  }

 private:
  Scratch<A> slots_;
};

// Division of R rows of W numbers into blocks, one task each. It depends on the shape only, and one thread computes a
// block in a fixed order: results are bit-equal for any number of threads.
struct RowPlan {
  int64_t R, W, block, blocks;

  RowPlan(int64_t R_, int64_t W_) : R(R_), W(W_) {
    constexpr int64_t TASK = 1 << 15; // elements: about 10 µs, several times the cost of waking a thread
    constexpr int64_t MAX_BLOCKS = 64; // each has its own partial sums
    block = std::max(divide_up(TASK, W), divide_up(R, MAX_BLOCKS));
    blocks = std::max<int64_t>(1, divide_up(R, block)); // no rows: one empty block
  }
};

// [..., W], contiguous, as rows.
inline RowPlan rows_of_width(const Tensor& x) {
  const int64_t W = x.size(x.dim() - 1);
  return RowPlan(x.numel() / W, W);
}

// Calls f(index of the block, first row, row after the last) for every block of the plan.
template <class F>
void parallel_rows(const RowPlan& plan, const F& f) {
  parallel_for(0, plan.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i, i * plan.block, std::min((i + 1) * plan.block, plan.R));
  });
}

// Column sums over all rows: partial sums of each block, which are then added in the order of the blocks.
template <class T>
class ColumnSums {
 public:
  using A = accumulate_t<T>;

  ColumnSums(const RowPlan& plan, bool wanted)
      : W_(plan.W), blocks_(plan.blocks), wanted_(wanted), sums_(scratch<A>(wanted ? plan.blocks * slots<T>(W_) : 0)) {}

  // Partial sums of a block, in slots, set to zero; null if not needed.
  A* start(int64_t block) const {
    if (!wanted_)
      return nullptr;
    A* sums = &sums_[block * slots<T>(W_)];
    std::fill(sums, sums + slots<T>(W_), A(0));
    return sums;
  }

  // [W] in the dtype of `like`; empty if not needed.
  Tensor total(const Tensor& like, bool wanted) const {
    Tensor out = make_empty({wanted ? W_ : 0}, like.scalar_type());
    if (wanted)
      add_up(out, 0);
    return out;
  }
  // Writes the sums, if wanted, to W elements of a vector from `first` on.
  void add_up(Tensor& out, int64_t first) const {
    if (!wanted_)
      return;
    for (int64_t block = 1; block < blocks_; ++block)
      add(&sums_[0], &sums_[block * slots<T>(W_)], slots<T>(W_));
    dispatch_features(out, "skipkernels", [&](auto type) {
      using Out = decltype(type);
      Out* data = out.mutable_data_ptr<Out>() + first;
      for (int64_t i = 0; i < W_; ++i)
        data[i] = narrow<Out>(accumulate_t<Out>(sums_[slot<T>(i)]));
    });
  }

 private:
  int64_t W_, blocks_;
  bool wanted_;
  Scratch<A> sums_;
};

} // namespace skipkernels
