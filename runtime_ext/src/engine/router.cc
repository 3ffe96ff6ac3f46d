// The router: scores in fp32, top-k by insertion.
#include "engine/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/exponential.h"

namespace cfmoe {
namespace {

constexpr float kMasked = -2.0F;  // below every score and what stands for a score that is no number

}  // namespace

Router::Router(const RouterOptions& options, std::span<uint16_t> kept)
    : options_(options),
      scores_(static_cast<size_t>(options.experts)),
      best_(static_cast<size_t>(options.experts)),
      ranked_(static_cast<size_t>(options.experts)),
      kept_(kept) {}

void Router::keep(int64_t token) {
  constexpr float kUnits = 65535.0F;
  const auto experts = static_cast<size_t>(options_.experts);
  for (size_t e = 0; e < experts; ++e) {
    kept_[static_cast<size_t>(token) * experts + e] =
        static_cast<uint16_t>(std::clamp(scores_[e], 0.0F, 1.0F) * kUnits + 0.5F);
  }
}

void Router::score(const float* logits) {
  const int32_t experts = options_.experts;
  if (options_.sigmoid) {
    for (int32_t e = 0; e < experts; ++e) scores_[e] = 1.0F / (1.0F + exponential(-logits[e]));
  } else {
    float largest = -std::numeric_limits<float>::infinity();
    for (int32_t e = 0; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
    float sum = 0.0F;
    for (int32_t e = 0; e < experts; ++e) {
      scores_[e] = exponential(logits[e] - largest);
      if (!std::isnan(scores_[e])) sum += scores_[e];
    }
    for (int32_t e = 0; e < experts; ++e) scores_[e] /= sum;
  }
  for (float& value : scores_) {
    if (std::isnan(value)) value = -1.0F;
  }
}

void Router::mask(const RouterGroups& groups) {
  const int32_t size = options_.experts / groups.count;
  for (int32_t g = 0; g < groups.count; ++g) {
    best_[g] = *std::max_element(scores_.begin() + g * size, scores_.begin() + (g + 1) * size);
  }
  const auto end = ranked_.begin() + groups.count;
  std::iota(ranked_.begin(), end, 0);
  std::sort(ranked_.begin(), end,
            [this](int32_t a, int32_t b) { return best_[a] > best_[b] || (best_[a] == best_[b] && a < b); });
  for (int32_t i = groups.top; i < groups.count; ++i) std::fill_n(scores_.begin() + ranked_[i] * size, size, kMasked);
}

void Router::route(const float* logits, int64_t n, int64_t stride, int32_t* ids, float* weights,
                   const RouterGroups& groups) {
  const int32_t top_k = options_.top_k;
  for (int64_t t = 0; t < n; ++t, ids += top_k, weights += top_k) {
    score(logits + t * stride);
    if (!kept_.empty()) keep(t);
    if (groups.top < groups.count) mask(groups);
    int32_t filled = 0;
    for (int32_t e = 0; e < options_.experts; ++e) {
      const float value = scores_[e];
      if (filled == top_k && !(value > weights[top_k - 1])) continue;
      int32_t place = filled < top_k ? filled++ : top_k - 1;
      for (; place > 0 && value > weights[place - 1]; --place) {
        weights[place] = weights[place - 1];
        ids[place] = ids[place - 1];
      }
      weights[place] = value;
      ids[place] = e;
    }
    float factor = options_.scale;
    if (options_.renormalise) {
      float sum = 0.0F;
      for (int32_t k = 0; k < top_k; ++k) sum += weights[k];
      factor /= sum;
    }
    for (int32_t k = 0; k < top_k; ++k) weights[k] *= factor;
  }
  if (!kept_.empty()) kept_count_ = static_cast<size_t>(n) * static_cast<size_t>(options_.experts);
}

}  // namespace cfmoe
