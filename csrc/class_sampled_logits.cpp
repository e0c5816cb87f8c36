// class_sampled_logits: scaled cosines of images and a sample of the rows of a class bank.
//
//   z_bk = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
//
// Map: the B × K plane is cut into blocks (Plan), one task each; a task computes its block in tiles. Backward contracts
// d_z with the rows (unit_rows.h). The gradient of s, Σ_bk d_z_bk · cosine_bk, is the sum over images of
// ⟨x_b/|x_b|, Σ_k d_z_bk t_k/|t_k|⟩, and also the sum over classes of ⟨t_k/|t_k|, Σ_b d_z_bk x_b/|x_b|⟩: dot products
// with a gradient of unit rows. If that gradient is not needed, or is rounded to bf16, the cosines are recomputed.
#include "unit_rows.h"

#include <numeric>
#include <tuple>

namespace skipkernels {
namespace {

constexpr const char* NAME = "class_sampled_logits";

std::tuple<Tensor, Tensor, Tensor> class_sampled_logits(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale, const std::optional<Tensor>& class_ids) {
  check_sample(NAME, image, text, logit_scale, class_ids);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Sample<T> sample(image, text, class_ids);
    places_of(NAME, sample.ids, sample.C); // refuses what is not a row of text
    const A scale = A(numbers(logit_scale)[0]);
    Tensor logits = make_empty<A>({sample.B, sample.K});
    Tensor image_norm = make_empty<A>({sample.B}), text_norm = make_empty<A>({sample.K});
    A* const out = logits.mutable_data_ptr<A>();
    for_each_tile(
        sample, Plan(sample.B, sample.K, sample.D), 0, image_norm.mutable_data_ptr<A>(),
        text_norm.mutable_data_ptr<A>(),
        [&](const A* cosine, int64_t b, int64_t k, int64_t b_count, int64_t k_count, const Block&) {
          for (int64_t i = 0; i < b_count; ++i)
            multiply(out + (b + i) * sample.K + k, cosine + i * k_count, scale, k_count);
        });
    outputs.emplace(logits, image_norm, text_norm);
  });
  return *outputs;
}

// Σ_i ⟨unit row i, d_unit_i⟩, in an order that does not depend on the number of threads.
template <class T, class A = accumulate_t<T>>
double sum_of_dots(const Rows<T>& rows, const A* norm, const A* d_unit, int64_t n, int64_t D) {
  std::vector<double> dots(n);
  parallel_for(0, n, std::max<int64_t>(1, (int64_t(1) << 16) / D), [&](int64_t begin, int64_t end) {
    const auto unit = scratch<A>(D);
    for (int64_t i = begin; i < end; ++i) {
      load_unit_row(unit.get(), rows[i], norm[i], D);
      dots[i] = dot(unit.get(), d_unit + i * D, D);
    }
  });
  return std::accumulate(dots.begin(), dots.end(), 0.0);
}

std::tuple<Tensor, Tensor, Tensor> class_sampled_logits_backward(
    const Tensor& d_logits_, const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    const Tensor& image_norm, const Tensor& text_norm, const std::optional<Tensor>& class_ids, bool need_image,
    bool need_text, bool need_logit_scale) {
  check_sample(NAME, image, text, logit_scale, class_ids);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Sample<T> sample(image, text, class_ids);
    places_of(NAME, sample.ids, sample.C); // refuses what is not a row of text
    const int64_t B = sample.B, K = sample.K, D = sample.D;
    STD_TORCH_CHECK(
        d_logits_.dim() == 2 && d_logits_.size(0) == B && d_logits_.size(1) == K && image_norm.numel() == B &&
            text_norm.numel() == K && image_norm.is_contiguous() && text_norm.is_contiguous(),
        NAME, ": backward must be given what forward returned.");
    const Tensor d_logits = with_contiguous_rows(d_logits_);
    const A* const d_z = d_logits.const_data_ptr<A>();
    const int64_t stride = d_logits.stride(0);
    const Plan plan(B, K, D);
    const A* const norms[] = {image_norm.const_data_ptr<A>(), text_norm.const_data_ptr<A>()};

    const auto unit_image = scratch<A>(need_image ? B * D : 0), unit_text = scratch<A>(need_text ? K * D : 0);
    contract<T>(
        {const_cast<A*>(d_z), B, K, stride}, // only read
        {sample.image, sample.text, norms[0], norms[1], D}, 0, need_image ? unit_image.get() : nullptr,
        need_text ? unit_text.get() : nullptr, false, plan.tasks() == 1);

    const A scale = A(numbers(logit_scale)[0]);
    Tensor d_image = empty_if(need_image, image), d_text = empty_if(need_text, text);
    Tensor d_logit_scale = empty_if(need_logit_scale, logit_scale);
    if (need_image)
      store_gradient<T>(sample.image, norms[0], unit_image.get(), B, D, scale, d_image.mutable_data_ptr<T>());
    if (need_text) {
      if (class_ids)
        std::memset(d_text.mutable_data_ptr(), 0, d_text.numel() * sizeof(T));
      store_gradient<T>(sample.text, norms[1], unit_text.get(), K, D, scale, d_text.mutable_data_ptr<T>());
    }
    if (need_logit_scale) {
      // d_image is a sum over classes, d_text a sum over images. The shorter sum has less rounding error.
      const bool sums_over_images = B <= K;
      double d_scale = 0;
      if ((sums_over_images ? need_text : need_image) && !std::is_same_v<T, BFloat16>) {
        const A* const d_unit = (sums_over_images ? unit_text : unit_image).get();
        const A* const norm = norms[sums_over_images];
        d_scale = sum_of_dots(sums_over_images ? sample.text : sample.image, norm, d_unit, std::max(B, K), D);
      } else {
        std::vector<double> along(plan.k_blocks * B, 0); // Σ_k d_z_bk · cosine_bk over the classes of a block
        std::vector<A> image_again(B), text_again(K);
        for_each_tile(
            sample, plan, 0, image_again.data(), text_again.data(),
            [&](const A* cosine, int64_t b, int64_t k, int64_t b_count, int64_t k_count, const Block& block) {
              for (int64_t i = 0; i < b_count; ++i)
                along[block.k_index * B + b + i] += dot(cosine + i * k_count, d_z + (b + i) * stride + k, k_count);
            });
        d_scale = std::accumulate(along.begin(), along.end(), 0.0);
      }
      set_number(d_logit_scale, d_scale);
    }
    outputs.emplace(d_image, d_text, d_logit_scale);
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("class_sampled_logits", TORCH_BOX(&class_sampled_logits));
  m.impl("class_sampled_logits_backward", TORCH_BOX(&class_sampled_logits_backward));
}

} // namespace skipkernels
