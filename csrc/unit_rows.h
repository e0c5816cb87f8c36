// Shared by the operators on unit rows: positions of sampled rows, and gradients of the rows from d_logits.
//
//   d_x_b = s · P_b Σ_k d_z_bk t_k/|t_k|,   d_t_k = s · P_k Σ_b d_z_bk x_b/|x_b|,   P the gradient of the unit norm
#pragma once

#include "tensor.h"

namespace skipkernels {

// Position of each row of the bank among the sampled rows, −1 if not sampled.
inline std::vector<int64_t> places_of(const char* name, const std::vector<int64_t>& ids, int64_t C) {
  std::vector<int64_t> place(C, -1);
  for (size_t k = 0; k < ids.size(); ++k) {
    const int64_t id = ids[k];
    STD_TORCH_CHECK(id >= 0 && id < C && place[id] < 0, name, ": class_ids must be different rows of text.");
    place[id] = int64_t(k);
  }
  return place;
}

// These checks of shapes, and those of values, keep memory accesses in bounds. skipkernels.functional explains the
// values: its errors have the argument that was given.
inline void check_sample(
    const char* name, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids) {
  STD_TORCH_CHECK(
      image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1) && image.scalar_type() == text.scalar_type(),
      name, ": image must be [B, D], text [C, D], of one dtype.");
  STD_TORCH_CHECK(image.size(0) > 0 && text.size(0) > 0 && image.size(1) > 0, name, ": B, C and D must be at least 1.");
  STD_TORCH_CHECK(logit_scale.numel() == 1 && logit_scale.dim() <= 1, name, ": logit_scale must have one element.");
  const double scale = numbers(logit_scale)[0];
  STD_TORCH_CHECK(
      std::isfinite(image.scalar_type() == ScalarType::Double ? scale : float(scale)), name,
      ": logit_scale must be finite.");
  STD_TORCH_CHECK(
      !class_ids || (class_ids->dim() == 1 && class_ids->size(0) > 0 && class_ids->scalar_type() == ScalarType::Long),
      name, ": class_ids must be int64 [K] with K at least 1.");
}

// Images and sampled rows of the bank.
template <class T>
struct Sample {
  int64_t B, K, C, D;
  Tensor image_storage, text_storage; // memory of the rows
  std::vector<int64_t> ids; // the sampled rows of the bank; empty: all of them
  Rows<T> image, text;

  Sample(const Tensor& image_, const Tensor& text_, const std::optional<Tensor>& class_ids)
      : B(image_.size(0)),
        K(class_ids ? class_ids->size(0) : text_.size(0)),
        C(text_.size(0)),
        D(image_.size(1)),
        image_storage(with_contiguous_rows(image_)),
        text_storage(with_contiguous_rows(text_)),
        ids(class_ids ? integers(*class_ids) : std::vector<int64_t>()),
        image(rows_of<T>(image_storage)),
        text(rows_of<T>(text_storage, class_ids ? ids.data() : nullptr)) {}
};

// Calls f(cosines, b, k, b_count, k_count, block) for every tile of the images p0 to p0 + plan.B − 1, numbered from 0; f
// may overwrite the cosines, [b_count, k_count]. Writes the norms of the rows.
template <class T, class F, class A = accumulate_t<T>>
void for_each_tile(
    const Sample<T>& sample, const Plan& plan, int64_t p0, A* image_norm, A* text_norm, const F& f) {
  const int64_t D = sample.D;
  parallel_blocks<Tile<A>>(plan, [&](Tile<A>& tile, const Block& block) {
    const auto [b_index, k_index, b0, b1, k0, k1] = block;
    for (int64_t k = k0; k < k1; k += K_TILE) {
      const int64_t k_count = std::min(K_TILE, k1 - k);
      for (int64_t i = 0; i < k_count; ++i) {
        const A norm = load_unit_row(&tile.text[i * D], sample.text[k + i], D);
        if (p0 == 0 && b_index == 0)
          text_norm[k + i] = norm;
      }
      for (int64_t b = b0; b < b1; b += B_TILE) {
        const int64_t b_count = std::min(B_TILE, b1 - b);
        for (int64_t i = 0; i < b_count; ++i) {
          const A norm = load_unit_row(&tile.image[i * D], sample.image[p0 + b + i], D);
          if (k == 0)
            image_norm[p0 + b + i] = norm;
        }
        tile.multiply(tile.cosine.get(), k_count, b_count, k_count, D);
        f(tile.cosine.get(), b, k, b_count, k_count, block);
      }
    }
  });
}

// True if PyTorch's bf16 product is faster than fp32: without these instructions it is emulated.
inline bool has_bf16_products() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// out[m, d] (+)= Σ_n factors[m, n] · unit row n, a tile of n at a time. A task is a range of m and of columns; if `out`
// is null, there are no tasks. `whole`: the problem is too small to divide; one task, without PyTorch's product.
//
// Large products of bf16 rows round both operands and the product of each tile to bf16, as plain PyTorch does; tiles
// are summed in fp32.
template <class T, class A = accumulate_t<T>>
struct Contraction {
  Matrix<A> factors; // [M, N]
  Rows<T> rows; // N of them
  const A* norm; // [N]
  int64_t D;
  A* out; // [M, D]
  bool accumulate;

  static constexpr int64_t M_TILE = 256, N_TILE = 512, D_TILE = 512;
  static constexpr bool IS_BF16 = std::is_same_v<T, BFloat16>;

  // Scratch of a thread.
  struct Workspace {
    Scratch<A> tile, product;
    Scratch<BFloat16> tile_bf16, factors_bf16, product_bf16;

    Workspace(int64_t n_count, int64_t width, bool whole)
        : tile(scratch<A>(n_count * width)), product(scratch<A>(whole ? 0 : M_TILE * width)) {
      if (IS_BF16 && !whole) {
        tile_bf16 = scratch<BFloat16>(n_count * width);
        factors_bf16 = scratch<BFloat16>(M_TILE * n_count);
        product_bf16 = scratch<BFloat16>(M_TILE * width);
      }
    }
  };

  int64_t width(bool whole) const {
    if (whole)
      return D;
    // Few rows: narrow pieces give more tasks. Many rows: wide pieces read the factors less often.
    return factors.rows <= M_TILE ? std::min<int64_t>(128, divide_up(D, 2)) : std::min(D, D_TILE);
  }

  int64_t tasks(bool whole) const {
    return out == nullptr ? 0 : divide_up(factors.rows, M_TILE) * divide_up(D, width(whole));
  }

  void run(int64_t task, bool whole, Workspace& own) const {
    const int64_t N = factors.columns, pieces = divide_up(D, width(whole));
    const int64_t m0 = task / pieces * M_TILE, m_count = std::min(M_TILE, factors.rows - m0);
    const int64_t d0 = task % pieces * width(whole), d_count = std::min(width(whole), D - d0);
    A* piece = out + m0 * D + d0;
    for (int64_t n = 0; n < N; n += N_TILE) {
      const int64_t n_count = std::min(N_TILE, N - n);
      for (int64_t i = 0; i < n_count; ++i)
        load_unit_row(&own.tile[i * d_count], rows[n + i] + d0, norm[n + i], d_count);
      const Matrix<A> a = factors.block(m0, n, m_count, n_count), b{own.tile.get(), n_count, d_count, d_count};
      const bool large = !whole && is_large(m_count, n_count, d_count);
      const bool first = !accumulate && n == 0;
      if (large && first && !(IS_BF16 && has_bf16_products())) {
        library_matmul({piece, m_count, d_count, D}, a, b);
        continue;
      }
      for (int64_t i = 0; i < m_count && first; ++i)
        std::fill(piece + i * D, piece + i * D + d_count, A(0));
      if (!large)
        small_matmul_add(piece, D, a.data, a.stride_row, a.stride_column, b.data, m_count, n_count, d_count);
      else if (IS_BF16 && has_bf16_products())
        add_product_bf16(piece, a, b, own);
      else
        add_product(piece, own.product.get(), a, b);
    }
  }

 private:
  template <class P>
  void add_product(A* piece, P* product, const Matrix<P>& a, const Matrix<P>& b) const {
    library_matmul({product, a.rows, b.columns, b.columns}, a, b);
    for (int64_t i = 0; i < a.rows; ++i)
      add(piece + i * D, product + i * b.columns, b.columns);
  }

  void add_product_bf16(A* piece, const Matrix<A>& a, const Matrix<A>& b, Workspace& own) const {
    if constexpr (IS_BF16) {
      convert_row(own.tile_bf16.get(), b.data, b.rows * b.columns);
      // Convert in memory order: one of the two contractions has d_logits transposed.
      const bool by_rows = a.stride_column == 1;
      const Matrix<A> in = by_rows ? a : a.transposed();
      for (int64_t i = 0; i < in.rows; ++i)
        convert_row(&own.factors_bf16[i * in.columns], in.data + i * in.stride_row, in.columns);
      const Matrix<BFloat16> narrow{own.factors_bf16.get(), in.rows, in.columns, in.columns};
      add_product<BFloat16>(
          piece, own.product_bf16.get(), by_rows ? narrow : narrow.transposed(),
          {own.tile_bf16.get(), b.rows, b.columns, b.columns});
    }
  }
};

// The unit rows of images and of classes, read by both contractions.
template <class T, class A = accumulate_t<T>>
struct UnitRows {
  Rows<T> image, text;
  const A *image_norm, *text_norm;
  int64_t D;
};

// Both contractions of the images from b0 on with d_logits [panel, K]: overwrites d_image [panel, D] and d_text [K, D],
// or adds to d_text if `accumulate`; either may be null.
template <class T, class A = accumulate_t<T>>
void contract(
    const Matrix<A>& d_logits, const UnitRows<T>& unit, int64_t b0, A* d_image, A* d_text, bool accumulate,
    bool whole) {
  const int64_t D = unit.D;
  const Contraction<T> images{d_logits, unit.text, unit.text_norm, D, d_image, false};
  const Contraction<T> texts{d_logits.transposed(), unit.image.from(b0), unit.image_norm + b0, D, d_text, accumulate};
  const int64_t image_tasks = images.tasks(whole), tasks = image_tasks + texts.tasks(whole);
  parallel_for(0, tasks, whole ? tasks + 1 : 1, [&](int64_t begin, int64_t end) {
    const int64_t n_count = std::min(std::max(d_logits.rows, d_logits.columns), images.N_TILE);
    typename Contraction<T>::Workspace own(n_count, std::max(images.width(whole), texts.width(whole)), whole);
    for (int64_t task = begin; task < end; ++task) {
      if (task < image_tasks)
        images.run(task, whole, own);
      else
        texts.run(task - image_tasks, whole, own);
    }
  });
}

// Calls write(plan, p, d_logits, stride) for one panel of images after the other, p the first image: it computes the
// norms and writes d_z, [plan.B, K]. Contracts each panel before the next one: d_image [B, D] and d_text [K, D] are
// gradients of the unit rows, without the factor scale; either may be null.
template <class T, class F, class A = accumulate_t<T>>
void for_each_panel(const Sample<T>& sample, const UnitRows<T>& unit, A* d_image, A* d_text, const F& write) {
  constexpr int64_t PANEL = int64_t(1) << 23; // 32 MiB in fp32
  const int64_t B = sample.B, K = sample.K, D = sample.D;
  const int64_t panel = std::min(B, std::max<int64_t>(PANEL / K / 16, 1) * 16);
  const int64_t stride = divide_up(K, 16) * 16; // rows of d_logits start on a cache line
  const auto d_logits = scratch<A>(panel * stride);
  for (int64_t p = 0; p < B; p += panel) {
    const Plan plan(std::min(panel, B - p), K, D);
    write(plan, p, d_logits.get(), stride);
    contract<T>(
        {d_logits.get(), plan.B, K, stride}, unit, p, d_image ? d_image + p * D : nullptr, d_text, p > 0,
        plan.tasks() == 1);
  }
}

// Gradient of the unit norm, times scale: writes d_rows at the n rows from the gradients of the unit rows. The caller
// sets the other rows to zero.
template <class T, class A = accumulate_t<T>>
void store_gradient(const Rows<T>& rows, const A* norm, const A* d_unit, int64_t n, int64_t D, A scale, T* d_rows) {
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / D);
  parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* d_row = d_rows + (rows.ids == nullptr ? i : rows.ids[i]) * D;
      store_unit_row_gradient(d_row, d_unit + i * D, scale, rows[i], norm[i], D);
    }
  });
}

} // namespace skipkernels
