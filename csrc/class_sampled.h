// The softmax of images over a sample of the rows of a class bank, for class_sampled_ce.
//
//   z_bk = s · ⟨x_b/|x_b|, t_k/|t_k|⟩,   lse_b = log Σ_k exp(z_bk),   p_bk = exp(z_bk − lse_b)
//   d_z_bk = a_b p_bk − e_b w_k + [k = y] (r_b − a_b),   with the factors of an image in Upstream
//
// Map: one panel of images at a time. The panel's plane of images × classes is cut into blocks (Plan), one task each. A
// task computes its block in tiles and stores the running top and sum of each image (vector.h, Softmax); these are
// combined at the end. Without gradients the panel is the whole batch, and only tiles of cosines are written. With
// gradients the cosines of the panel are kept, [panel, K], turned into d_z in place, and contracted with the rows
// before the next panel: three matrix products in all, as many as with all logits in memory.
#pragma once

#include "unit_rows.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

namespace skipkernels {

enum Reduction : int64_t { MEAN, SUM, NONE }; // as REDUCTIONS of skipkernels/ops/class_sampled_ce.py

inline void check_sampled(
    const char* name, const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight) {
  check_sample(name, image, text, logit_scale, class_ids);
  STD_TORCH_CHECK(
      labels.dim() == 1 && labels.size(0) == image.size(0) && labels.scalar_type() == ScalarType::Long, name,
      ": labels must be int64 [B].");
  STD_TORCH_CHECK(
      !class_weight || (class_weight->dim() == 1 && class_weight->size(0) == text.size(0)), name,
      ": class_weight must be [C].");
}

// Sampled rows, targets and weights, as forward and backward need them.
template <class T>
struct Problem : Sample<T> {
  using A = accumulate_t<T>;
  using Sample<T>::B, Sample<T>::K, Sample<T>::C, Sample<T>::ids;

  std::vector<int64_t> target; // position of the label among the sampled rows; −1: none
  std::vector<A> weight; // of the sampled rows; empty: all 1, and no smoothing
  A scale, smoothing;
  A total_weight; // Σ_k w_k
  double denominator = 1; // divisor of the summed loss: for the mean, Σ_b w_y of the images not ignored

  Problem(
      const char* name, const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
      const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight, double label_smoothing,
      int64_t ignore_index, int64_t reduction)
      : Sample<T>(image, text, class_ids),
        target(integers(labels)),
        scale(A(numbers(logit_scale)[0])),
        smoothing(A(label_smoothing)) {
    find_targets(name, ignore_index);
    if (class_weight || smoothing != 0) {
      const std::vector<double> given = class_weight ? numbers(*class_weight) : std::vector<double>(C, 1.0);
      weight.resize(K);
      for (int64_t k = 0; k < K; ++k)
        weight[k] = A(given[ids.empty() ? k : ids[k]]);
    }
    total_weight = A(weight.empty() ? double(K) : std::accumulate(weight.begin(), weight.end(), 0.0));
    STD_TORCH_CHECK(
        reduction >= MEAN && reduction <= NONE, name, ": reduction must be 0 (mean), 1 (sum) or 2 (none); got ",
        reduction, ".");
    if (reduction == MEAN) {
      denominator = 0;
      for (int64_t b = 0; b < B; ++b)
        denominator += target[b] >= 0 ? target_weight(b) : 0;
    }
  }

  A target_weight(int64_t b) const {
    return weight.empty() ? A(1) : weight[target[b]];
  }

 private:
  void find_targets(const char* name, int64_t ignore_index) {
    const std::vector<int64_t> place = ids.empty() ? std::vector<int64_t>() : places_of(name, ids, C);
    for (int64_t b = 0; b < B; ++b) {
      const int64_t label = target[b];
      if (label == ignore_index) {
        target[b] = -1;
        continue;
      }
      STD_TORCH_CHECK(label >= 0 && label < C, name, ": labels must be rows of text, or ignore_index.");
      target[b] = ids.empty() ? label : place[label];
      STD_TORCH_CHECK(target[b] >= 0, name, ": labels must be among class_ids.");
    }
  }
};

// Outputs; null if not needed. d_image and d_text are gradients of the unit rows, without the factor scale.
template <class A>
struct Results {
  double *loss, *lse; // [B]
  A *image_norm, *text_norm;
  A *d_image, *d_text; // [B, D], [K, D]
  double* d_logit_scale;

  bool with_gradients() const {
    return d_image || d_text || d_logit_scale;
  }
};

// Loss, lse and norms of the images p0 to p0 + plan.B − 1. Also writes the cosines if `cosines` is not null.
template <class T, class A = accumulate_t<T>>
void forward(
    const Problem<T>& problem, const Plan& plan, int64_t p0, A* cosines, int64_t stride, const Results<A>& out) {
  const int64_t B = plan.B, D = problem.D;
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
        // Every panel and every block of images loads these rows: the first stores the norms, so each has one writer.
        if (p0 == 0 && b_index == 0)
          out.text_norm[k + i] = norm;
      }
      for (int64_t b = b0; b < b1; b += B_TILE) {
        const int64_t b_count = std::min(B_TILE, b1 - b);
        for (int64_t i = 0; i < b_count; ++i) {
          const A norm = load_unit_row(&tile.image[i * D], problem.image[p0 + b + i], D);
          if (k == 0) // one writer, as above
            out.image_norm[p0 + b + i] = norm;
        }
        A* const product = cosines ? cosines + b * stride + k : tile.cosine.get();
        const int64_t stride_product = cosines ? stride : k_count;
        tile.multiply(product, stride_product, b_count, k_count, D);
        for (int64_t i = b; i < b + b_count; ++i) {
          const A* cosine = product + (i - b) * stride_product;
          online_softmax(&block_top[i], &block_sum[i], cosine, problem.scale, k_count);
          const int64_t y = problem.target[p0 + i] - k;
          if (y >= 0 && y < k_count) // of one block only, since class ids are unique
            target_cosine[i] = cosine[y];
          if (smooth)
            block_weighted[i] += dot(cosine, &problem.weight[k], k_count);
        }
      }
    }
  });

  const double scale = problem.scale, smoothing = problem.smoothing;
  for (int64_t b = 0; b < B; ++b) {
    double best = top[b], exp_sum = 0, weighted_cosines = 0;
    for (int64_t i = b + B; i < plan.k_blocks * B; i += B)
      best = scale * top[i] > scale * best ? top[i] : best;
    for (int64_t i = b; i < plan.k_blocks * B; i += B) {
      exp_sum += sum[i] * std::exp(scale * (top[i] - best));
      weighted_cosines += smooth ? weighted[i] : 0;
    }
    const double lse = scale * best + std::log(exp_sum);
    const bool has_target = problem.target[p0 + b] >= 0;
    out.lse[p0 + b] = lse;
    double loss = 0;
    if (has_target) {
      // Not lse − z_y, which cancels where the loss is small.
      loss = problem.target_weight(p0 + b) * (scale * (best - target_cosine[b]) + std::log(exp_sum));
      if (smooth)
        loss = (1 - smoothing) * loss + smoothing / problem.K * (problem.total_weight * lse - scale * weighted_cosines);
    }
    out.loss[p0 + b] = loss;
  }
}

// Softmax of an image from its lse, in fp64, with lse/scale in place of the top: any number near the top works. Near a
// scale of 0, where lse/scale overflows, all logits are 0, and any number works.
template <class A>
Softmax<A> softmax_of(double lse, A scale) {
  const A top = std::abs(scale) < A(1e-30) ? A(0) : A(lse / scale);
  return {scale, top, A(lse - double(scale) * double(top))};
}

// Factors of the gradient of the logits of an image; w_k are the weights of the problem, 1 if there are none:
//   d_z_k = softmax · p_k − spread · w_k, and for the true class softmax · (p_y − 1) + rest − spread · w_y
template <class A>
struct Upstream {
  A softmax, rest, spread;
};

// Cosines of one image with k_count classes → d_z, in place; returns Σ_k d_z_bk · cosine_bk.
template <class T, class A = accumulate_t<T>>
A logits_gradient(
    const Problem<T>& problem, const Upstream<A>& upstream, double lse, int64_t b, int64_t k, int64_t k_count,
    A* cosine) {
  const auto [factor, rest, spread] = upstream;
  if (problem.target[b] < 0) { // ignored; with a weight of 0 a NaN stays NaN, as in cross_entropy
    std::fill(cosine, cosine + k_count, A(0));
    return 0;
  }
  const Softmax<A> softmax = softmax_of(lse, problem.scale);
  const A* weight = problem.smoothing != 0 ? &problem.weight[k] : nullptr;
  const int64_t y = problem.target[b] - k;
  if (y < 0 || y >= k_count)
    return softmax_gradient(cosine, softmax, factor, spread, weight, k_count);
  // The true class separately: expm1 computes p − 1 without cancellation.
  const A cosine_y = cosine[y], log_p = softmax.scale * (cosine_y - softmax.top) - softmax.log_sum;
  const A d_logit = factor * std::expm1(log_p) + rest - spread * (weight ? weight[y] : 1);
  A along = softmax_gradient(cosine, softmax, factor, spread, weight, y);
  const A* others = weight ? weight + y + 1 : nullptr;
  along += softmax_gradient(cosine + y + 1, softmax, factor, spread, others, k_count - y - 1);
  cosine[y] = d_logit;
  return along + d_logit * cosine_y;
}

// Computes all needed outputs; `upstream` are the factors of each image.
template <class T, class A = accumulate_t<T>>
void run(const Problem<T>& problem, const std::vector<Upstream<A>>& upstream, const Results<A>& out) {
  if (!out.with_gradients())
    return forward<T>(
        problem, Plan(problem.B, problem.K, problem.D), 0, static_cast<A*>(nullptr), 0, out);

  const UnitRows<T> unit{problem.image, problem.text, out.image_norm, out.text_norm, problem.D};
  for_each_panel<T>(
      problem, unit, out.d_image, out.d_text, [&](const Plan& plan, int64_t p, A* d_logits, int64_t stride) {
        forward<T>(problem, plan, p, d_logits, stride, out);
        const auto along = scratch<A>(plan.k_blocks * plan.B); // Σ_k d_z_bk · cosine_bk over the classes of a block
        parallel_blocks(plan, [&](const Block& block) {
          const auto [b_index, k_index, b0, b1, k0, k1] = block;
          for (int64_t i = b0; i < b1; ++i)
            along[k_index * plan.B + i] = logits_gradient(
                problem, upstream[p + i], out.lse[p + i], p + i, k0, k1 - k0, &d_logits[i * stride + k0]);
        });
        if (out.d_logit_scale)
          *out.d_logit_scale = std::accumulate(&along[0], &along[plan.k_blocks * plan.B], *out.d_logit_scale);
      });
}

// A null pointer for an empty tensor.
template <class A>
A* data_of(Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr<A>();
}

} // namespace skipkernels
