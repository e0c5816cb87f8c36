// pairwise_sigmoid: sigmoid loss of all pairs of an image and a text.
//
//   z_bn    = s · ⟨x_b/|x_b|, t_n/|t_n|⟩ + β
//   loss    = Σ_b Σ_n log(1 + exp(−y_bn z_bn)),   y_bn = +1 for n = label_b, else −1
//   d_z_bn  = d_loss · −y_bn σ(−y_bn z_bn)
//
// Map: a sum over elements, so a tile of cosines is read once (unit_rows.h). Without gradients only tiles are written.
// With gradients, d_z of a panel of images is written with the sums and contracted with the rows. The forward pass
// computes the gradients, up to the factor d_loss, if they are needed; else backward does.
#include "class_sampled.h"

namespace skipkernels {
namespace {

constexpr const char* NAME = "pairwise_sigmoid";
constexpr const char* MEANING = "no text";
constexpr int64_t NO_TEXT = -1; // as in skipkernels/ops/pairwise_sigmoid.py

// Sums over pairs, without the factor d_loss.
struct Totals {
  double loss = 0, along = 0, d_logits = 0; // loss, Σ d_z_bn · cosine_bn, Σ d_z_bn

  template <class A>
  void add(const PairSums<A>& sums) {
    loss += sums.loss, along += sums.along, d_logits += sums.d_logits;
  }
};

// The pair of an image with its own text; writes d_z in place of the cosine.
template <class A>
PairSums<A> own_pair(A cosine, A scale, A bias, A* d_logit) {
  const A z = scale * cosine + bias, e = std::exp(-std::abs(z)), d = -(z >= 0 ? e : A(1)) / (1 + e);
  if (d_logit)
    *d_logit = d;
  return {std::max(-z, A(0)) + std::log1p(e), d * cosine, d};
}

template <class T, class A = accumulate_t<T>>
struct Pairs {
  const Problem<T> problem;
  const A bias;

  Pairs(const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& scale, const Tensor& bias_)
      : problem(NAME, MEANING, image, text, labels, scale, std::nullopt, std::nullopt, 0, NO_TEXT, NONE),
        bias(A(numbers(bias_)[0])) {
    if (!std::isfinite(bias))
      refuse(NAME, ": logit_bias must be finite; got ", bias, ".");
  }

  // All sums; also norms, and gradients of the unit rows without the factor scale, if their pointers are not null.
  Totals run(A* image_norm, A* text_norm, A* d_image, A* d_text) const {
    Totals totals;
    const auto write = [&](const Plan& plan, int64_t p, A* d_logits, int64_t stride) {
      totals_of(plan, p, d_logits, stride, image_norm, text_norm, &totals);
    };
    if (d_image || d_text)
      for_each_panel<T>(
          problem, {problem.image, problem.text, image_norm, text_norm, problem.D}, d_image, d_text, write);
    else
      write(Plan(problem.B, problem.K, problem.D), 0, nullptr, 0);
    return totals;
  }

 private:
  void totals_of(
      const Plan& plan, int64_t p, A* d_logits, int64_t stride, A* image_norm, A* text_norm, Totals* totals) const {
    std::vector<Totals> of_task(plan.tasks());
    for_each_tile(
        problem, plan, p, image_norm, text_norm,
        [&](const A* cosines, int64_t b, int64_t k, int64_t b_count, int64_t k_count, const Block& block) {
          Totals& own = of_task[block.b_index * plan.k_blocks + block.k_index];
          for (int64_t i = 0; i < b_count; ++i) {
            const A* cosine = cosines + i * k_count;
            A* d_logit = d_logits ? d_logits + (b + i) * stride + k : nullptr;
            const auto others = [&](int64_t begin, int64_t end) {
              own.add(sigmoid_pairs(
                  d_logit ? d_logit + begin : nullptr, cosine + begin, problem.scale, bias, end - begin));
            };
            const int64_t y = problem.target[p + b + i] - k;
            if (y < 0 || y >= k_count) {
              others(0, k_count);
              continue;
            }
            others(0, y);
            own.add(own_pair(cosine[y], problem.scale, bias, d_logit ? d_logit + y : nullptr));
            others(y + 1, k_count);
          }
        });
    for (const Totals& own : of_task)
      totals->add(PairSums<double>{own.loss, own.along, own.d_logits});
  }
};

void check(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const Tensor& logit_bias) {
  check_sampled(NAME, image, text, labels, logit_scale, std::nullopt, std::nullopt);
  STD_TORCH_CHECK(logit_bias.numel() == 1 && logit_bias.dim() <= 1, NAME, ": logit_bias must have one element.");
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Forward pairwise_sigmoid(
    const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale, const Tensor& logit_bias,
    bool keep_image, bool keep_text, bool keep_sums) {
  check(image, text, labels, logit_scale, logit_bias);
  std::optional<Forward> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Pairs<T> pairs(image, text, labels, logit_scale, logit_bias);
    const int64_t B = image.size(0), N = text.size(0), D = image.size(1);
    Tensor loss = scalar_of<A>(), image_norm = vector_of<A>(B), text_norm = vector_of<A>(N);
    Tensor d_image = rows_if<A>(keep_image, B, D), d_text = rows_if<A>(keep_text, N, D);
    Tensor sums = vector_of<double>(keep_sums ? 2 : 0);
    const Totals totals = pairs.run(
        image_norm.mutable_data_ptr<A>(), text_norm.mutable_data_ptr<A>(), data_of<A>(d_image), data_of<A>(d_text));
    set_number(loss, totals.loss);
    if (keep_sums) {
      sums.mutable_data_ptr<double>()[0] = totals.along;
      sums.mutable_data_ptr<double>()[1] = totals.d_logits;
    }
    outputs.emplace(loss, image_norm, text_norm, d_image, d_text, sums);
  });
  return *outputs;
}

Backward pairwise_sigmoid_backward(
    const Tensor& d_loss, const Tensor& image, const Tensor& text, const Tensor& labels, const Tensor& logit_scale,
    const Tensor& logit_bias, const Tensor& image_norm, const Tensor& text_norm, const Tensor& kept_image,
    const Tensor& kept_text, const Tensor& kept_sums, bool need_image, bool need_text, bool need_logit_scale,
    bool need_logit_bias) {
  check(image, text, labels, logit_scale, logit_bias);
  std::optional<Backward> outputs;
  dispatch_features(image, NAME, [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const int64_t B = image.size(0), N = text.size(0), D = image.size(1);
    STD_TORCH_CHECK(
        d_loss.numel() == 1 && d_loss.dim() <= 1 && image_norm.numel() == B && text_norm.numel() == N &&
            image_norm.is_contiguous() && text_norm.is_contiguous() && kept_image.is_contiguous() &&
            kept_image.numel() % (B * D) == 0 && kept_text.is_contiguous() && kept_text.numel() % (N * D) == 0 &&
            kept_sums.is_contiguous() && kept_sums.numel() % 2 == 0,
        NAME, ": backward must be given what forward returned.");

    // Gradients without the factor d_loss, those of rows also without scale: saved by forward, or computed here.
    Tensor unit_image = kept_image, unit_text = kept_text;
    Totals totals;
    const bool need_sums = need_logit_scale || need_logit_bias;
    if ((need_image && kept_image.numel() == 0) || (need_text && kept_text.numel() == 0) ||
        (need_sums && kept_sums.numel() == 0)) {
      unit_image = rows_if<A>(need_image, B, D), unit_text = rows_if<A>(need_text, N, D);
      std::vector<A> image_norms(B), text_norms(N);
      totals = Pairs<T>(image, text, labels, logit_scale, logit_bias)
                   .run(image_norms.data(), text_norms.data(), data_of<A>(unit_image), data_of<A>(unit_text));
    } else if (need_sums) {
      totals.along = kept_sums.const_data_ptr<double>()[0];
      totals.d_logits = kept_sums.const_data_ptr<double>()[1];
    }

    const double factor = numbers(d_loss)[0], scale = numbers(logit_scale)[0];
    Tensor d_image = empty_if(need_image, image), d_text = empty_if(need_text, text);
    Tensor d_logit_scale = empty_if(need_logit_scale, logit_scale);
    Tensor d_logit_bias = empty_if(need_logit_bias, logit_bias);
    const Sample<T> sample(image, text, std::nullopt);
    if (need_image)
      store_gradient<T>(
          sample.image, image_norm.const_data_ptr<A>(), unit_image.const_data_ptr<A>(), B, D, A(factor * scale),
          d_image.mutable_data_ptr<T>());
    if (need_text)
      store_gradient<T>(
          sample.text, text_norm.const_data_ptr<A>(), unit_text.const_data_ptr<A>(), N, D, A(factor * scale),
          d_text.mutable_data_ptr<T>());
    if (need_logit_scale)
      set_number(d_logit_scale, factor * totals.along);
    if (need_logit_bias)
      set_number(d_logit_bias, factor * totals.d_logits);
    outputs.emplace(d_image, d_text, d_logit_scale, d_logit_bias);
  });
  return *outputs;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("pairwise_sigmoid", TORCH_BOX(&pairwise_sigmoid));
  m.impl("pairwise_sigmoid_backward", TORCH_BOX(&pairwise_sigmoid_backward));
}

} // namespace skipkernels
