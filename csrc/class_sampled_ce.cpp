// class_sampled_ce: cross-entropy of images against a sample of the rows of a class bank.
//
//   z_bk   = s · ⟨x_b/|x_b|, t_k/|t_k|⟩
//   loss_b = (1 − ε) w_y (lse_b − z_by) + ε/K Σ_k w_k (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)
//   d_z_bk = up_b · ((1 − ε) w_y (p_bk − [k = y]) + ε/K (W p_bk − w_k)),   p_bk = exp(z_bk − lse_b),  W = Σ_k w_k
//
// Map: see class_sampled.h. The forward pass computes the gradients, up to the factor d_loss, if they are needed and
// the reduction is not "none". Backward then applies the gradient of the unit norm; if forward computed no gradients,
// it recomputes everything.
#include "class_sampled.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "class_sampled_ce";

// Factors of each image; upstream(b) is the gradient of its loss. Images that are ignored have none.
template <class T, class F, class A = accumulate_t<T>>
std::vector<Upstream<A>> factors_of(const Problem<T>& problem, const F& upstream) {
  std::vector<Upstream<A>> factors(problem.B, {0, 0, 0});
  for (int64_t b = 0; b < problem.B; ++b) {
    if (problem.target[b] < 0)
      continue;
    const A hit = upstream(b) * (1 - problem.smoothing) * problem.target_weight(b);
    const A spread = upstream(b) * problem.smoothing / A(problem.K);
    factors[b] = {hit + spread * problem.total_weight, spread * problem.total_weight, spread};
  }
  return factors;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward class_sampled_ce(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight, double label_smoothing,
    int64_t ignore_index, int64_t reduction, bool keep_image, bool keep_text, bool keep_logit_scale) {
  check_sampled(NAME, image, text, labels, logit_scale, class_ids, class_weight);
  std::optional<Forward> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Problem<T> problem(
        NAME, image, text, labels, logit_scale, class_ids, class_weight, label_smoothing, ignore_index, reduction);
    const int64_t B = problem.B, K = problem.K, D = problem.D;
    const bool each = reduction == NONE;
    STD_TORCH_CHECK(
        !each || !(keep_image || keep_text || keep_logit_scale), NAME,
        ": gradients can be kept only of a mean or a sum.");
    Tensor loss = each ? make_empty<A>({B}) : make_empty<A>({}), denominator = make_empty<A>({});
    Tensor lse = make_empty<double>({B}), image_norm = make_empty<A>({B}), text_norm = make_empty<A>({K});
    Tensor d_image = make_empty<A>({keep_image ? B : 0, D}), d_text = make_empty<A>({keep_text ? K : 0, D});
    Tensor d_logit_scale = make_empty<double>({keep_logit_scale});
    double d_scale = 0;
    std::vector<double> losses(B);
    run<T>(
        problem, factors_of(problem, [&](int64_t) { return A(1 / problem.denominator); }),
        {losses.data(), lse.mutable_data_ptr<double>(), image_norm.mutable_data_ptr<A>(),
         text_norm.mutable_data_ptr<A>(), data_of<A>(d_image), data_of<A>(d_text),
         keep_logit_scale ? &d_scale : nullptr});
    if (keep_logit_scale)
      set_number(d_logit_scale, d_scale);
    if (each)
      std::copy(losses.begin(), losses.end(), loss.mutable_data_ptr<A>());
    else
      set_number(loss, std::accumulate(losses.begin(), losses.end(), 0.0) / problem.denominator);
    set_number(denominator, problem.denominator);
    outputs.emplace(loss, lse, image_norm, text_norm, denominator, d_image, d_text, d_logit_scale);
  });
  return *outputs;
}

std::tuple<Tensor, Tensor, Tensor> class_sampled_ce_backward(
    const Tensor& d_loss, const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const Tensor& /*lse*/, const Tensor& image_norm, const Tensor& text_norm, const Tensor& /*denominator*/,
    const Tensor& kept_image, const Tensor& kept_text, const Tensor& kept_logit_scale,
    const std::optional<Tensor>& class_ids, const std::optional<Tensor>& class_weight, double label_smoothing,
    int64_t ignore_index, int64_t reduction, bool need_image, bool need_text, bool need_logit_scale) {
  check_sampled(NAME, image, text, labels, logit_scale, class_ids, class_weight);
  std::optional<std::tuple<Tensor, Tensor, Tensor>> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const int64_t B = image.size(0), C = text.size(0), K = class_ids ? class_ids->size(0) : C, D = image.size(1);
    const bool each = reduction == NONE;
    STD_TORCH_CHECK(
        d_loss.numel() == (each ? B : 1) && d_loss.dim() <= 1 && image_norm.numel() == B && text_norm.numel() == K &&
            image_norm.is_contiguous() && text_norm.is_contiguous() && kept_image.is_contiguous() &&
            kept_image.numel() % (B * D) == 0 && kept_text.is_contiguous() && kept_text.numel() % (K * D) == 0,
        NAME, ": backward must be given what forward returned.");
    const std::vector<double> upstream = numbers(d_loss);

    // Gradients of the unit rows: saved by forward, or computed here.
    Tensor unit_image = kept_image, unit_text = kept_text;
    double unit_scale = kept_logit_scale.numel() == 0 ? 0 : numbers(kept_logit_scale)[0];
    const bool kept =
        !((need_image && kept_image.numel() == 0) || (need_text && kept_text.numel() == 0) ||
          (need_logit_scale && kept_logit_scale.numel() == 0));
    if (!kept) {
      const Problem<T> problem(
          NAME, image, text, labels, logit_scale, class_ids, class_weight, label_smoothing, ignore_index, reduction);
      unit_image = make_empty<A>({need_image ? B : 0, D}), unit_text = make_empty<A>({need_text ? K : 0, D});
      unit_scale = 0;
      std::vector<double> losses(B), lses(B);
      std::vector<A> image_norms(B), text_norms(K);
      run<T>(
          problem, factors_of(problem, [&](int64_t b) { return A(each ? upstream[b] : 1 / problem.denominator); }),
          {losses.data(), lses.data(), image_norms.data(), text_norms.data(), data_of<A>(unit_image),
           data_of<A>(unit_text), need_logit_scale ? &unit_scale : nullptr});
    }
    const double factor = each ? 1 : upstream[0], scale = numbers(logit_scale)[0];

    Tensor d_image = empty_if(need_image, image), d_text = empty_if(need_text, text);
    Tensor d_logit_scale = empty_if(need_logit_scale, logit_scale);
    if (need_image) {
      const Tensor rows = with_contiguous_rows(image);
      store_gradient<T>(
          rows_of<T>(rows), image_norm.const_data_ptr<A>(), unit_image.const_data_ptr<A>(), B, D, A(factor * scale),
          d_image.mutable_data_ptr<T>());
    }
    if (need_text) {
      const Tensor rows = with_contiguous_rows(text);
      const std::vector<int64_t> ids = class_ids ? integers(*class_ids) : std::vector<int64_t>();
      places_of(NAME, ids, C); // refuses repeated ids, among others: two tasks would race for one row of d_text
      if (class_ids)
        std::memset(d_text.mutable_data_ptr(), 0, d_text.numel() * sizeof(T));
      store_gradient<T>(
          rows_of<T>(rows, class_ids ? ids.data() : nullptr), text_norm.const_data_ptr<A>(),
          unit_text.const_data_ptr<A>(), K, D, A(factor * scale), d_text.mutable_data_ptr<T>());
    }
    if (need_logit_scale)
      set_number(d_logit_scale, factor * unit_scale);
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
