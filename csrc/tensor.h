// Shared by all operators: tensors through PyTorch's stable ABI, parallel loops, and PyTorch's matrix product. Only
// stable headers are included, so that one binary works with every torch from 2.10.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "vector.h"

namespace skipkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls a function that allocates a tensor. The stable ABI of the target version reports a failed call without the
// reason; with valid arguments, that is too little memory.
template <class F>
Tensor allocated(const F& allocate) {
  try {
    return allocate();
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("skipkernels: can't allocate memory for a tensor (") + error.what() + ")");
  }
}
inline Tensor make_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  return allocated([&] { return torch::stable::empty(sizes, type); });
}
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : allocated([&] { return torch::stable::contiguous(x); });
}
// The tensor, or a copy if its last dimension is not contiguous.
inline Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) == 1 || x.stride(last) == 1 ? x : as_contiguous(x);
}

// Calls f(begin, end) for parts of a range, on up to torch.get_num_threads() threads. Rethrows an exception of f: the
// stable ABI would only report that parallel_for failed.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr failure;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t part_begin, int64_t part_end) {
    try {
      f(part_begin, part_end);
    } catch (...) {
      if (!failed.test_and_set())
        failure = std::current_exception();
    }
  });
  if (failure)
    std::rethrow_exception(failure);
}

// Uninitialised memory for a task, aligned to a cache line.
struct Free {
  void operator()(void* memory) const {
    ::operator delete[](memory, std::align_val_t(64));
  }
};
template <class A>
using Scratch = std::unique_ptr<A[], Free>;
template <class A>
Scratch<A> scratch(int64_t n) {
  return Scratch<A>(new (std::align_val_t(64)) A[std::max<int64_t>(n, 1)]);
}

template <class A>
constexpr ScalarType scalar_type_of = std::is_same_v<A, double>     ? ScalarType::Double
                                      : std::is_same_v<A, BFloat16> ? ScalarType::BFloat16
                                                                    : ScalarType::Float;

template <class A>
Tensor make_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return make_empty(sizes, scalar_type_of<A>);
}
// A contiguous tensor of the shape of `like`, by default of its type; empty if not needed.
inline Tensor empty_if(bool need, const Tensor& like, std::optional<ScalarType> type = std::nullopt) {
  std::vector<int64_t> sizes{0};
  if (need) {
    sizes.clear();
    for (int64_t i = 0; i < like.dim(); ++i)
      sizes.push_back(like.size(i));
  }
  return make_empty(sizes, type.value_or(like.scalar_type()));
}

// Calls f with a value of the type of the features.
template <class F>
void dispatch_features(const Tensor& features, const char* name, const F& f) {
  switch (features.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(BFloat16());
    case ScalarType::Half: return f(Half());
    default: STD_TORCH_CHECK(false, name, ": features must be float32, bfloat16, float16 or float64.");
  }
}

// The elements of a floating-point tensor of any type and at most one dimension.
inline std::vector<double> numbers(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  const int64_t stride = tensor.dim() > 0 ? tensor.stride(0) : 0;
  dispatch_features(tensor, "skipkernels", [&](auto type) {
    using T = decltype(type);
    const T* data = tensor.const_data_ptr<T>();
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = double(accumulate_t<T>(data[i * stride]));
  });
  return values;
}

inline void set_number(Tensor& tensor, double value) {
  dispatch_features(tensor, "skipkernels", [&](auto type) {
    using T = decltype(type);
    tensor.mutable_data_ptr<T>()[0] = T(accumulate_t<T>(value));
  });
}

inline std::vector<int64_t> integers(const Tensor& tensor) {
  const int64_t* data = tensor.const_data_ptr<int64_t>();
  const int64_t n = tensor.size(0), stride = tensor.stride(0);
  std::vector<int64_t> values(n);
  for (int64_t i = 0; i < n; ++i)
    values[i] = data[i * stride];
  return values;
}

// A matrix with contiguous rows and any row stride, or the rows `ids` of it.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  const int64_t* ids = nullptr;

  const T* operator[](int64_t i) const {
    return data + (ids == nullptr ? i : ids[i]) * stride;
  }
  Rows from(int64_t i) const {
    return ids == nullptr ? Rows{data + i * stride, stride, nullptr} : Rows{data, stride, ids + i};
  }
};

template <class T>
Rows<T> rows_of(const Tensor& matrix, const int64_t* ids = nullptr) {
  return {matrix.const_data_ptr<T>(), matrix.stride(0), ids};
}

// A matrix with any strides, for PyTorch's product.
template <class A>
struct Matrix {
  A* data;
  int64_t rows, columns, stride_row, stride_column = 1;

  Matrix transposed() const {
    return {data, columns, rows, stride_column, stride_row};
  }
  Matrix block(int64_t row, int64_t column, int64_t block_rows, int64_t block_columns) const {
    return {data + row * stride_row + column * stride_column, block_rows, block_columns, stride_row, stride_column};
  }
  Tensor tensor() const {
    return torch::stable::from_blob(
        data, std::array<int64_t, 2>{rows, columns}, std::array<int64_t, 2>{stride_row, stride_column},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), scalar_type_of<A>);
  }
};

// Limits this thread to one OpenMP thread, until destroyed. oneDNN divides a product by omp_get_max_threads(), also where
// it runs serially in a parallel region: with AMX the last bits of bf16 products depend on it. The function is looked up,
// since nothing here links OpenMP; without OpenMP there is nothing to limit.
class OneThread {
 public:
  // get_num_threads first: a thread's first call of it sets the number of OpenMP threads to PyTorch's.
  OneThread() : before_(int(torch::stable::get_num_threads())) {
    set(1);
  }
  ~OneThread() {
    set(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static void set([[maybe_unused]] int threads) {
#if __has_include(<dlfcn.h>)
    using Function = void(int);
    static Function* const omp_set_num_threads = reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
    if (omp_set_num_threads != nullptr)
      omp_set_num_threads(threads);
#endif
  }

  const int before_;
};

// out = a · b, on this thread: the bits do not depend on the number of threads.
template <class A>
void library_matmul(const Matrix<A>& out, const Matrix<A>& a, const Matrix<A>& b) {
  using torch::stable::detail::from;
  const OneThread one_thread;
  allocated([&] { // PyTorch may allocate
    std::array<StableIValue, 3> stack{from(a.tensor()), from(b.tensor()), from(out.tensor())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  });
}

// True if PyTorch's product on one thread is faster than small_matmul.
inline bool is_large(int64_t m, int64_t n, int64_t d) {
  return std::min({m, n, d}) >= 16 && double(m) * double(n) * double(d) >= 1 << 20;
}

inline int64_t divide_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// Division of the B × K plane of (image, class) pairs into blocks, one task each. It depends on the shape only, and one
// thread computes a block in a fixed order: results are bit-equal for any number of threads.
struct Plan {
  int64_t B, K, D;
  int64_t b_blocks = 1, k_blocks = 1;
  int64_t b_block, k_block; // images and classes in a block; fewer in the last

  Plan(int64_t B, int64_t K, int64_t D);

  int64_t tasks() const {
    return b_blocks * k_blocks;
  }
};

struct Block {
  int64_t b_index, k_index;
  int64_t b0, b1, k0, k1; // images b0 to b1 − 1, classes k0 to k1 − 1
};

constexpr int64_t B_TILE = 256; // a tile of logits, 256 × 512 fp32, is 512 KiB: it stays in the L2 cache
constexpr int64_t K_TILE = 512;

inline Plan::Plan(int64_t B_, int64_t K_, int64_t D_) : B(B_), K(K_), D(D_), b_block(B_), k_block(K_) {
  constexpr double TASK_WORK = 1 << 20; // multiply-adds: about 25 µs, several times the cost of waking a thread
  constexpr double MAX_TASKS = 64;
  constexpr int64_t GRAIN = 16; // PyTorch's product takes 1.5 times as long for 63 columns as for 64
  // More work gives more and larger tasks; larger ones load fewer rows per product.
  const double wanted = std::min(std::sqrt(double(B) * double(K) * double(D) / TASK_WORK), MAX_TASKS);
  while (double(tasks()) < wanted && std::max(b_block, k_block) >= 2 * GRAIN) {
    int64_t& block = k_block >= b_block ? k_block : b_block;
    block = divide_up(divide_up(block, 2), GRAIN) * GRAIN;
    b_blocks = divide_up(B, b_block);
    k_blocks = divide_up(K, k_block);
  }
}

inline Block block_of(const Plan& plan, int64_t task) {
  const int64_t b_index = task / plan.k_blocks, k_index = task % plan.k_blocks;
  const int64_t b = b_index * plan.b_block, k = k_index * plan.k_block;
  return {b_index, k_index, b, std::min(b + plan.b_block, plan.B), k, std::min(k + plan.k_block, plan.K)};
}

// Calls f for every block of the plan, in parallel; each thread has its own tile.
template <class Tile, class F>
void parallel_blocks(const Plan& plan, const F& f) {
  parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    Tile tile(plan);
    for (int64_t task = begin; task < end; ++task)
      f(tile, block_of(plan, task));
  });
}

// Without tiles.
template <class F>
void parallel_blocks(const Plan& plan, const F& f) {
  parallel_for(0, plan.tasks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task)
      f(block_of(plan, task));
  });
}

// A tile of cosines: unit rows of images and of classes, and their product.
template <class A>
struct Tile {
  bool may_use_library;
  Scratch<A> image, text, cosine;

  explicit Tile(const Plan& plan)
      : Tile(plan.tasks() > 1, plan.D, std::min(plan.b_block, B_TILE), std::min(plan.k_block, K_TILE)) {}

  // out[i, j] = ⟨image_i, text_j⟩
  void multiply(A* out, int64_t stride_out, int64_t b_count, int64_t k_count, int64_t D) {
    if (!may_use_library || !is_large(b_count, k_count, D))
      return small_matmul_nt(out, stride_out, image.get(), text.get(), b_count, k_count, D);
    library_matmul(
        Matrix<A>{out, b_count, k_count, stride_out}, Matrix<A>{image.get(), b_count, D, D},
        Matrix<A>{text.get(), k_count, D, D}.transposed());
  }

 private:
  Tile(bool may_use_library_, int64_t D, int64_t b_count, int64_t k_count)
      : may_use_library(may_use_library_),
        image(scratch<A>(b_count * D)),
        text(scratch<A>(k_count * D)),
        cosine(scratch<A>(b_count * k_count)) {}
};

} // namespace skipkernels
