// class_scores: the score by which classes are selected for a batch.
//
//   score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image, if there are labels
//
// Map: blocks and tiles as in class_sampled_ce.cpp. A task stores the maximum over the images of its block for each
// class; the blocks of a class are combined at the end.
#include "tensor.h"

#include <limits>

namespace skipkernels {
namespace {

template <class T, class A = accumulate_t<T>>
void best_cosines(const Rows<T>& image, const Rows<T>& prototypes, int64_t B, int64_t C, int64_t D, A* scores) {
  const Plan plan(B, C, D);
  const auto partial = scratch<A>(plan.b_blocks * C); // for each block of images, the best of every class

  parallel_blocks<Tile<A>>(plan, [&](Tile<A>& tile, const Block& block) {
    const auto [b_index, c_index, b0, b1, c0, c1] = block;
    A* best = &partial[b_index * C];
    std::fill(best + c0, best + c1, -std::numeric_limits<A>::infinity());
    for (int64_t c = c0; c < c1; c += K_TILE) {
      const int64_t c_count = std::min(K_TILE, c1 - c);
      for (int64_t i = 0; i < c_count; ++i)
        load_row(&tile.text[i * D], prototypes[c + i], D);
      for (int64_t b = b0; b < b1; b += B_TILE) {
        const int64_t b_count = std::min(B_TILE, b1 - b);
        for (int64_t i = 0; i < b_count; ++i)
          load_unit_row(&tile.image[i * D], image[b + i], D);
        tile.multiply(tile.cosine.get(), c_count, b_count, c_count, D);
        for (int64_t i = 0; i < b_count; ++i)
          maximum(best + c, &tile.cosine[i * c_count], c_count);
      }
    }
  });

  std::copy(&partial[0], &partial[C], scores);
  for (int64_t i = 1; i < plan.b_blocks; ++i)
    maximum(scores, &partial[i * C], C);
}

Tensor class_scores(const Tensor& image, const Tensor& prototypes, const std::optional<Tensor>& labels) {
  STD_TORCH_CHECK(
      image.dim() == 2 && prototypes.dim() == 2 && image.size(1) == prototypes.size(1) &&
          image.scalar_type() == prototypes.scalar_type(),
      "class_scores: image must be [B, D], prototypes [C, D], of one dtype.");
  STD_TORCH_CHECK(
      image.size(0) > 0 && prototypes.size(0) > 0 && image.size(1) > 0, "class_scores: B, C and D must be at least 1.");
  STD_TORCH_CHECK(
      !labels || (labels->dim() == 1 && labels->size(0) == image.size(0) && labels->scalar_type() == ScalarType::Long),
      "class_scores: labels must be int64 [B].");
  const int64_t B = image.size(0), C = prototypes.size(0), D = image.size(1);
  std::optional<Tensor> scores;
  dispatch_features(image, "class_scores", [&](auto type) {
    using T = decltype(type);
    using A = accumulate_t<T>;
    const Tensor images = with_contiguous_rows(image), rows = with_contiguous_rows(prototypes);
    scores = make_empty<A>({C});
    A* data = scores->mutable_data_ptr<A>();
    best_cosines(rows_of<T>(images), rows_of<T>(rows), B, C, D, data);
    if (!labels)
      return;
    for (const int64_t label : integers(*labels)) {
      STD_TORCH_CHECK(label >= 0 && label < C, "class_scores: labels must be rows of prototypes.");
      data[label] = std::numeric_limits<A>::infinity();
    }
  });
  return *scores;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(skipkernels, CPU, m) {
  m.impl("class_scores", TORCH_BOX(&class_scores));
}

} // namespace skipkernels
