// class_sampled_ce: cross-entropy of images against a sample of the rows of a class bank.
//
//   z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
//   loss_b = (1 − ε) w_y (lse_b − z_by) + ε/K Σ_k w_k (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)
//   d_z_bk = up_b · ((1 − ε) w_y (p_bk − [k = y]) + ε/K (W p_bk − w_k)),   p_bk = exp(z_bk − lse_b),  W = Σ_k w_k
//
// Map of the forward pass: the B × K plane is cut into blocks (Plan), a task each; a task goes through its block in
// tiles, so that only tiles of z are ever written, and leaves the running top and sum of each image (vector.h,
// Softmax); these are combined at the end.
//
// Map of the backward pass: a panel of images at a time, z is computed again and turned into d_z in place, [panel, K];
// then d_z · t/|t| and d_zᵀ · x/|x|, a task for each piece of a result; at the end, back through the unit norm.
#include "tensor.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>

namespace skipkernels {
namespace {

constexpr const char* NAME = "class_sampled_cross_entropy";

// Messages for people are skipkernels.functional's; this keeps a direct call inside the memory.
void check_shapes(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight) {
  STD_TORCH_CHECK(
      image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1) && image.scalar_type() == text.scalar_type(),
      NAME, ": image must be [B, D], text [C, D], of one dtype.");
  STD_TORCH_CHECK(image.size(0) > 0 && text.size(0) > 0 && image.size(1) > 0, NAME, ": B, C and D must be at least 1.");
  STD_TORCH_CHECK(
      labels.dim() == 1 && labels.size(0) == image.size(0) && labels.scalar_type() == ScalarType::Long, NAME,
      ": labels must be int64 [B].");
  STD_TORCH_CHECK(logit_scale.numel() == 1 && logit_scale.dim() <= 1, NAME, ": logit_scale must have one element.");
  STD_TORCH_CHECK(
      !class_ids || (class_ids->dim() == 1 && class_ids->size(0) > 0 && class_ids->scalar_type() == ScalarType::Long),
      NAME, ": class_ids must be int64 [K] with K at least 1.");
  STD_TORCH_CHECK(
      !class_weight || (class_weight->dim() == 1 && class_weight->size(0) == text.size(0)), NAME,
      ": class_weight must be [C].");
}

// What forward and backward know before they look at a feature.
template <class T>
struct Problem {
  using A = accumulate_t<T>;

  int64_t B, K, C, D;
  Tensor image_storage, text_storage; // what the rows point into
  std::vector<int64_t> ids; // the sampled rows of the bank; empty: all of them
  Rows<T> image, text;
  std::vector<int64_t> target; // the label's place among the sampled rows, or −1: ignored
  std::vector<A> weight; // of the sampled rows; empty: all 1, and no smoothing
  A scale, smoothing;
  A total_weight; // Σ_k w_k
  double denominator = 0; // Σ_b w_y over the images that are not ignored

  Problem(
      const Tensor& image_, const Tensor& text_, const Tensor& labels, const Tensor& logit_scale,
      const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight, double label_smoothing,
      int64_t ignore_index)
      : B(image_.size(0)),
        K(class_ids ? class_ids->size(0) : text_.size(0)),
        C(text_.size(0)),
        D(image_.size(1)),
        image_storage(with_contiguous_rows(image_)),
        text_storage(with_contiguous_rows(text_)),
        ids(class_ids ? integers(*class_ids) : std::vector<int64_t>()),
        image(rows_of<T>(image_storage)),
        text(rows_of<T>(text_storage, class_ids ? ids.data() : nullptr)),
        target(integers(labels)),
        scale(A(numbers(logit_scale)[0])),
        smoothing(A(label_smoothing)) {
    if (!std::isfinite(scale))
      refuse(NAME, ": logit_scale must be finite; got ", scale, ".");
    find_targets(ignore_index);
    if (class_weight || smoothing != 0) {
      const std::vector<double> given = class_weight ? numbers(*class_weight) : std::vector<double>(C, 1.0);
      weight.resize(K);
      for (int64_t k = 0; k < K; ++k)
        weight[k] = A(given[ids.empty() ? k : ids[k]]);
    }
    total_weight = A(weight.empty() ? double(K) : std::accumulate(weight.begin(), weight.end(), 0.0));
    for (int64_t b = 0; b < B; ++b)
      denominator += target[b] >= 0 ? target_weight(b) : 0;
  }

  A target_weight(int64_t b) const {
    return weight.empty() ? A(1) : weight[target[b]];
  }

 private:
  void find_targets(int64_t ignore_index) {
    std::vector<int64_t> place; // of a row of the bank among the sampled ones
    if (!ids.empty()) {
      place.assign(C, -1);
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = ids[k];
        if (id < 0 || id >= C)
          refuse(NAME, ": class_ids must be rows of text, 0 to ", C - 1, "; got ", id, " at position ", k, ".");
        if (place[id] >= 0)
          refuse(NAME, ": class_ids must have no duplicates; got ", id, " at positions ", place[id], " and ", k, ".");
        place[id] = k;
      }
    }
    for (int64_t b = 0; b < B; ++b) {
      const int64_t label = target[b];
      if (label == ignore_index) {
        target[b] = -1;
        continue;
      }
      if (label < 0 || label >= C)
        refuse(
            NAME, ": labels must be rows of text, 0 to ", C - 1, ", or ignore_index (", ignore_index, "); got ", label,
            " for image ", b, ".");
      target[b] = ids.empty() ? label : place[label];
      if (target[b] < 0)
        refuse(
            NAME, ": labels must be among class_ids; got ", label, " for image ", b,
            ". Select the classes so that every label is kept.");
    }
  }
};

template <class T, class A = accumulate_t<T>>
void forward(
    const Problem<T>& problem, const std::string& reduction, A* loss, double* lse, A* image_norm, A* text_norm) {
  const int64_t B = problem.B, D = problem.D;
  const Plan plan(B, problem.K, D);
  const bool smooth = problem.smoothing != 0;
  // For each block of classes and image: top cosine, sum (see Softmax), and Σ_k w_k cosine_bk where it is needed.
  const auto top = scratch<A>(plan.k_blocks * B), sum = scratch<A>(plan.k_blocks * B);
  const auto weighted = scratch<A>(smooth ? plan.k_blocks * B : 0);
  const auto target_cosine = scratch<A>(B);

  parallel_blocks<Tile<A>>(plan, [&](Tile<A>& tile, const Block& block) {
    const auto [b_index, k_index, b0, b1, k0, k1] = block;
    A *block_top = &top[k_index * B], *block_sum = &sum[k_index * B], *block_weighted = &weighted[k_index * B * smooth];
    std::fill(block_sum + b0, block_sum + b1, A(0));
    if (smooth)
      std::fill(block_weighted + b0, block_weighted + b1, A(0));
    for (int64_t k = k0; k < k1; k += K_TILE) {
      const int64_t k_count = std::min(K_TILE, k1 - k);
      for (int64_t i = 0; i < k_count; ++i) {
        const A norm = load_unit_row(&tile.text[i * D], problem.text[k + i], D);
        if (b_index == 0)
          text_norm[k + i] = norm;
      }
      for (int64_t b = b0; b < b1; b += B_TILE) {
        const int64_t b_count = std::min(B_TILE, b1 - b);
        for (int64_t i = 0; i < b_count; ++i) {
          const A norm = load_unit_row(&tile.image[i * D], problem.image[b + i], D);
          if (k == 0)
            image_norm[b + i] = norm;
        }
        tile.multiply(tile.cosine.get(), k_count, b_count, k_count, D);
        for (int64_t i = b; i < b + b_count; ++i) {
          const A* cosine = &tile.cosine[(i - b) * k_count];
          online_softmax(&block_top[i], &block_sum[i], cosine, problem.scale, k_count);
          const int64_t y = problem.target[i] - k;
          if (y >= 0 && y < k_count)
            target_cosine[i] = cosine[y];
          if (smooth)
            block_weighted[i] += dot(cosine, &problem.weight[k], k_count);
        }
      }
    }
  });

  const double scale = problem.scale, smoothing = problem.smoothing;
  double total = 0;
  for (int64_t b = 0; b < B; ++b) {
    double best = top[b], exp_sum = 0, weighted_cosines = 0;
    for (int64_t i = b + B; i < plan.k_blocks * B; i += B)
      best = scale * top[i] > scale * best ? top[i] : best;
    for (int64_t i = b; i < plan.k_blocks * B; i += B) {
      exp_sum += sum[i] * std::exp(scale * (top[i] - best));
      weighted_cosines += smooth ? weighted[i] : 0;
    }
    lse[b] = scale * best + std::log(exp_sum);
    double loss_b = 0;
    if (problem.target[b] >= 0) {
      // Not lse − z_y: the difference is small where the loss is.
      loss_b = problem.target_weight(b) * (scale * (best - target_cosine[b]) + std::log(exp_sum));
      if (smooth)
        loss_b = (1 - smoothing) * loss_b +
                 smoothing / problem.K * (problem.total_weight * lse[b] - scale * weighted_cosines);
    }
    total += loss_b;
    if (reduction == "none")
      loss[b] = A(loss_b);
  }
  if (reduction != "none")
    *loss = A(reduction == "mean" ? total / problem.denominator : total);
}

// The softmax of an image whose lse is known, in fp64: the top cosine may be any that is near lse/scale.
template <class A>
Softmax<A> softmax_of(double lse, A scale) {
  const A top = scale == 0 ? A(0) : A(lse / scale);
  return {scale, top, A(lse - double(scale) * double(top))};
}

// The tile's row of cosines of one image → d_z, in place; returns Σ_k d_z_bk · cosine_bk. `upstream` is the gradient of
// its loss.
template <class T, class A = accumulate_t<T>>
A logits_gradient(const Problem<T>& problem, A upstream, double lse, int64_t b, int64_t k, int64_t k_count, A* cosine) {
  if (problem.target[b] < 0) {
    std::fill(cosine, cosine + k_count, A(0));
    return 0;
  }
  const Softmax<A> softmax = softmax_of(lse, problem.scale);
  const A hit = upstream * (1 - problem.smoothing) * problem.target_weight(b);
  const A spread = upstream * problem.smoothing / A(problem.K);
  const A factor = hit + spread * problem.total_weight;
  const A* weight = problem.smoothing != 0 ? &problem.weight[k] : nullptr;
  const int64_t y = problem.target[b] - k;
  if (y < 0 || y >= k_count)
    return softmax_gradient(cosine, softmax, factor, spread, weight, k_count);
  // The true class by itself: p − 1 is formed before anything rounds it.
  const A cosine_y = cosine[y], log_p = softmax.scale * (cosine_y - softmax.top) - softmax.log_sum;
  const A d_logit =
      hit * std::expm1(log_p) + spread * (problem.total_weight * std::exp(log_p) - (weight ? weight[y] : 0));
  A along = softmax_gradient(cosine, softmax, factor, spread, weight, y);
  const A* rest = weight ? weight + y + 1 : nullptr;
  along += softmax_gradient(cosine + y + 1, softmax, factor, spread, rest, k_count - y - 1);
  cosine[y] = d_logit;
  return along + d_logit * cosine_y;
}

// out[m, d] (+)= Σ_n factors[m, n] · unit row n, a tile of n at a time. A piece of the sum, some m and some columns, is
// a task; none where there is no `out`. `whole` stands for a problem too small to divide: one piece, and no library.
template <class T, class A = accumulate_t<T>>
struct Contraction {
  Matrix<A> factors; // [M, N]
  Rows<T> rows; // N of them
  const A* norm; // [N]
  int64_t D;
  A* out; // [M, D]
  bool accumulate;

  static constexpr int64_t M_TILE = 256, N_TILE = 512, D_TILE = 512;

  int64_t width(bool whole) const {
    if (whole)
      return D;
    // Few rows: more threads find work in narrow pieces. Many rows: wide pieces read the factors less often.
    return factors.rows <= M_TILE ? std::min<int64_t>(128, divide_up(D, 2)) : std::min(D, D_TILE);
  }

  int64_t tasks(bool whole) const {
    return out == nullptr ? 0 : divide_up(factors.rows, M_TILE) * divide_up(D, width(whole));
  }

  // `tile` has room for N_TILE rows of the width, `product` for M_TILE.
  void run(int64_t task, bool whole, A* tile, A* product) const {
    const int64_t N = factors.columns, pieces = divide_up(D, width(whole));
    const int64_t m0 = task / pieces * M_TILE, m_count = std::min(M_TILE, factors.rows - m0);
    const int64_t d0 = task % pieces * width(whole), d_count = std::min(width(whole), D - d0);
    A* piece = out + m0 * D + d0;
    for (int64_t n = 0; n < N; n += N_TILE) {
      const int64_t n_count = std::min(N_TILE, N - n);
      const bool first = !accumulate && n == 0;
      for (int64_t i = 0; i < n_count; ++i)
        load_unit_row(tile + i * d_count, rows[n + i] + d0, norm[n + i], d_count);
      const Matrix<A> a = factors.block(m0, n, m_count, n_count), b{tile, n_count, d_count, d_count};
      if (whole || !is_large(m_count, n_count, d_count)) {
        for (int64_t i = 0; i < m_count && first; ++i)
          std::fill(piece + i * D, piece + i * D + d_count, A(0));
        small_matmul_add(piece, D, a.data, a.stride_row, a.stride_column, b.data, m_count, n_count, d_count);
      } else if (first) {
        library_matmul({piece, m_count, d_count, D}, a, b);
      } else {
        library_matmul({product, m_count, d_count, d_count}, a, b);
        for (int64_t i = 0; i < m_count; ++i)
          add(piece + i * D, product + i * d_count, d_count);
      }
    }
  }
};

// Where the gradient of the unit rows is summed up: in the result itself if that has the type and the order for it.
template <class T, class A = accumulate_t<T>>
A* unit_gradient(T* d_rows, const Rows<T>& rows, int64_t n, int64_t D, Scratch<A>& own) {
  if (d_rows == nullptr)
    return nullptr;
  if constexpr (std::is_same_v<T, A>)
    if (rows.ids == nullptr)
      return d_rows;
  own = scratch<A>(n * D);
  return own.get();
}

// Back through the unit norm: rows of d_rows from the gradient of the unit rows.
template <class T, class A = accumulate_t<T>>
void store_gradient(const Rows<T>& rows, const A* norm, const A* d_unit, int64_t n, int64_t D, A scale, T* d_rows) {
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 16) / D);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      T* d_row = d_rows + (rows.ids == nullptr ? i : rows.ids[i]) * D;
      store_unit_row_gradient(d_row, d_unit + i * D, scale, rows[i], norm[i], D);
    }
  });
}

// The gradients that are wanted; a null pointer stands for one that is not.
template <class T, class A = accumulate_t<T>>
void backward(
    const Problem<T>& problem, const std::vector<A>& upstream, const double* lse, const A* image_norm,
    const A* text_norm, T* d_image, T* d_text, double* d_logit_scale) {
  constexpr int64_t PANEL = int64_t(1) << 23; // 32 MiB in fp32
  const int64_t B = problem.B, K = problem.K, D = problem.D;
  const int64_t panel = std::min(B, std::max<int64_t>(PANEL / K / 16, 1) * 16);
  const int64_t stride = divide_up(K, 16) * 16; // rows of d_logits start on a cache line
  const auto d_logits = scratch<A>(panel * stride);
  Scratch<A> own_image, own_text;
  A* const d_unit_image = unit_gradient(d_image, problem.image, B, D, own_image);
  A* const d_unit_text = unit_gradient(d_text, problem.text, K, D, own_text);

  for (int64_t p = 0; p < B; p += panel) {
    const int64_t p_count = std::min(panel, B - p);
    const Plan plan(p_count, K, D);
    const auto along = scratch<A>(plan.k_blocks * p_count); // Σ_k d_z_bk · cosine_bk over the classes of a block
    parallel_blocks<Tile<A>>(plan, [&](Tile<A>& tile, const Block& block) {
      const auto [b_index, k_index, b0, b1, k0, k1] = block;
      std::fill(&along[k_index * p_count + b0], &along[k_index * p_count + b1], A(0));
      for (int64_t k = k0; k < k1; k += K_TILE) {
        const int64_t k_count = std::min(K_TILE, k1 - k);
        for (int64_t i = 0; i < k_count; ++i)
          load_unit_row(&tile.text[i * D], problem.text[k + i], text_norm[k + i], D);
        for (int64_t b = b0; b < b1; b += B_TILE) {
          const int64_t b_count = std::min(B_TILE, b1 - b);
          for (int64_t i = 0; i < b_count; ++i)
            load_unit_row(&tile.image[i * D], problem.image[p + b + i], image_norm[p + b + i], D);
          tile.multiply(&d_logits[b * stride + k], stride, b_count, k_count, D);
          for (int64_t i = b; i < b + b_count; ++i)
            along[k_index * p_count + i] +=
                logits_gradient(problem, upstream[p + i], lse[p + i], p + i, k, k_count, &d_logits[i * stride + k]);
        }
      }
    });
    if (d_logit_scale)
      *d_logit_scale = std::accumulate(&along[0], &along[plan.k_blocks * p_count], *d_logit_scale);

    const Matrix<A> d_z{d_logits.get(), p_count, K, stride};
    A* const panel_image = d_image ? d_unit_image + p * D : nullptr;
    const Contraction<T> images{d_z, problem.text, text_norm, D, panel_image, false};
    const Contraction<T> texts{d_z.transposed(), problem.image.from(p), image_norm + p, D, d_unit_text, p > 0};
    const bool whole = plan.tasks() == 1; // a small problem: not worth a second thread
    const int64_t image_tasks = images.tasks(whole), tasks = image_tasks + texts.tasks(whole);
    torch::stable::parallel_for(0, tasks, whole ? tasks + 1 : 1, [&](int64_t begin, int64_t end) {
      const int64_t width = std::max(images.width(whole), texts.width(whole));
      const auto tile = scratch<A>(std::min(std::max(K, p_count), images.N_TILE) * width);
      const auto product = scratch<A>(whole ? 0 : images.M_TILE * width);
      for (int64_t task = begin; task < end; ++task) {
        if (task < image_tasks)
          images.run(task, whole, tile.get(), product.get());
        else
          texts.run(task - image_tasks, whole, tile.get(), product.get());
      }
    });
  }
  if (d_image)
    store_gradient(problem.image, image_norm, d_unit_image, B, D, problem.scale, d_image);
  if (d_text)
    store_gradient(problem.text, text_norm, d_unit_text, K, D, problem.scale, d_text);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> class_sampled_ce(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight, double label_smoothing,
    int64_t ignore_index, const std::string& reduction) {
  check_shapes(image, text, labels, logit_scale, class_ids, class_weight);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem(image, text, labels, logit_scale, class_ids, class_weight, label_smoothing, ignore_index);
    Tensor loss = reduction == "none" ? vector_of<A>(problem.B) : scalar_of<A>();
    Tensor lse = vector_of<double>(problem.B);
    Tensor image_norm = vector_of<A>(problem.B), text_norm = vector_of<A>(problem.K);
    forward(
        problem, reduction, loss.mutable_data_ptr<A>(), lse.mutable_data_ptr<double>(),
        image_norm.mutable_data_ptr<A>(), text_norm.mutable_data_ptr<A>());
    outputs.emplace(loss, lse, image_norm, text_norm);
  });
  return *outputs;
}

std::tuple<Tensor, Tensor, Tensor> class_sampled_ce_backward(
    const Tensor& d_loss, const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const Tensor& lse, const Tensor& image_norm, const Tensor& text_norm, const std::optional<Tensor>& class_ids,
    const std::optional<Tensor>& class_weight, double label_smoothing, int64_t ignore_index,
    const std::string& reduction, bool need_image, bool need_text, bool need_logit_scale) {
  check_shapes(image, text, labels, logit_scale, class_ids, class_weight);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem(image, text, labels, logit_scale, class_ids, class_weight, label_smoothing, ignore_index);
    STD_TORCH_CHECK(
        d_loss.numel() == (reduction == "none" ? problem.B : 1) && d_loss.dim() <= 1 && lse.numel() == problem.B &&
            image_norm.numel() == problem.B && text_norm.numel() == problem.K && lse.is_contiguous() &&
            image_norm.is_contiguous() && text_norm.is_contiguous(),
        NAME, ": backward must be given what forward returned.");
    const std::vector<double> given = numbers(d_loss);
    std::vector<A> upstream(problem.B); // the gradient of each image's loss
    for (int64_t b = 0; b < problem.B; ++b)
      upstream[b] = A(reduction == "none" ? given[b] : reduction == "sum" ? given[0] : given[0] / problem.denominator);
    Tensor d_image = torch::stable::empty({need_image ? problem.B : 0, problem.D}, image.scalar_type());
    Tensor d_text = torch::stable::empty({need_text ? problem.C : 0, problem.D}, image.scalar_type());
    Tensor d_logit_scale = torch::stable::empty({0}, logit_scale.scalar_type());
    if (need_logit_scale)
      d_logit_scale = torch::stable::empty_like(logit_scale);
    if (need_text && class_ids)
      std::memset(d_text.mutable_data_ptr(), 0, d_text.numel() * sizeof(T));
    double d_scale = 0;
    backward(
        problem, upstream, lse.const_data_ptr<double>(), image_norm.const_data_ptr<A>(), text_norm.const_data_ptr<A>(),
        need_image ? d_image.mutable_data_ptr<T>() : nullptr, need_text ? d_text.mutable_data_ptr<T>() : nullptr,
        need_logit_scale ? &d_scale : nullptr);
    if (need_logit_scale)
      set_number(d_logit_scale, d_scale);
    outputs.emplace(d_image, d_text, d_logit_scale);
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("class_sampled_ce", TORCH_BOX(&class_sampled_ce));
  m.impl("class_sampled_ce_backward", TORCH_BOX(&class_sampled_ce_backward));
}

} // namespace skipkernels
