// class_sampled_lse: log-sum-exp of the logits of images over a sample of the rows of a class bank, and the logit of
// the label: what one process contributes to a cross-entropy over the classes of several processes.
//
//   z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
//   lse_b  = log Σ_k exp(z_bk),   target_b = z_by, or 0 for the label −1
//   d_z_bk = d_lse_b p_bk + d_target_b [k = y],   p_bk = exp(z_bk − lse_b)
//
// Map: see class_sampled.h. Gradients depend on d_lse and d_target of each image: backward recomputes the cosines.
#include "class_sampled.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "class_sampled_lse";
constexpr const char* MEANING = "a class of another process";
constexpr int64_t ELSEWHERE = -1; // as in skipkernels/ops/class_sampled_lse.py

std::tuple<Tensor, Tensor, Tensor, Tensor> class_sampled_lse(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids) {
  check_sampled(NAME, image, text, labels, logit_scale, class_ids, std::nullopt);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem(
        NAME, MEANING, image, text, labels, logit_scale, class_ids, std::nullopt, 0, ELSEWHERE, NONE);
    Tensor lse = vector_of<double>(problem.B), target = vector_of<double>(problem.B);
    Tensor image_norm = vector_of<A>(problem.B), text_norm = vector_of<A>(problem.K);
    run<T>(
        problem, {},
        {nullptr, lse.mutable_data_ptr<double>(), target.mutable_data_ptr<double>(), image_norm.mutable_data_ptr<A>(),
         text_norm.mutable_data_ptr<A>(), nullptr, nullptr, nullptr});
    outputs.emplace(lse, target, image_norm, text_norm);
  });
  return *outputs;
}

std::tuple<Tensor, Tensor, Tensor> class_sampled_lse_backward(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale, const Tensor& /*lse*/,
    const Tensor& /*image_norm*/, const Tensor& /*text_norm*/, const Tensor& d_lse, const Tensor& d_target,
    const std::optional<Tensor>& class_ids, bool need_image, bool need_text, bool need_logit_scale) {
  check_sampled(NAME, image, text, labels, logit_scale, class_ids, std::nullopt);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem(
        NAME, MEANING, image, text, labels, logit_scale, class_ids, std::nullopt, 0, ELSEWHERE, NONE);
    const int64_t B = problem.B, K = problem.K, D = problem.D;
    STD_TORCH_CHECK(
        d_lse.dim() == 1 && d_lse.numel() == B && d_target.dim() == 1 && d_target.numel() == B, NAME,
        ": backward must be given gradients of what forward returned.");
    const std::vector<double> of_lse = numbers(d_lse), of_target = numbers(d_target);
    std::vector<Upstream<A>> upstream(B);
    for (int64_t b = 0; b < B; ++b) // the sum cancels if this process has most of the probability: in fp64
      upstream[b] = {A(of_lse[b]), A(of_lse[b] + of_target[b]), 0};

    Tensor unit_image = rows_if<A>(need_image, B, D), unit_text = rows_if<A>(need_text, K, D);
    double d_scale = 0;
    std::vector<double> lse(B);
    std::vector<A> image_norm(B), text_norm(K);
    run<T>(
        problem, upstream,
        {nullptr, lse.data(), nullptr, image_norm.data(), text_norm.data(), data_of<A>(unit_image),
         data_of<A>(unit_text), need_logit_scale ? &d_scale : nullptr});

    Tensor d_image = empty_if(need_image, image), d_text = empty_if(need_text, text);
    Tensor d_logit_scale = empty_if(need_logit_scale, logit_scale);
    if (need_image)
      store_gradient<T>(
          problem.image, image_norm.data(), unit_image.const_data_ptr<A>(), B, D, problem.scale,
          d_image.mutable_data_ptr<T>());
    if (need_text) {
      if (class_ids)
        std::memset(d_text.mutable_data_ptr(), 0, d_text.numel() * sizeof(T));
      store_gradient<T>(
          problem.text, text_norm.data(), unit_text.const_data_ptr<A>(), K, D, problem.scale,
          d_text.mutable_data_ptr<T>());
    }
    if (need_logit_scale)
      set_number(d_logit_scale, d_scale);
    outputs.emplace(d_image, d_text, d_logit_scale);
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("class_sampled_lse", TORCH_BOX(&class_sampled_lse));
  m.impl("class_sampled_lse_backward", TORCH_BOX(&class_sampled_lse_backward));
}

} // namespace skipkernels
