// The router: scores in fp32, top-k by insertion.
#include "engine/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/exponential.h"
#include "engine/thread_pool.h"

namespace cfmoe {
namespace {

constexpr int64_t kTokensToShare = 32;
constexpr float kMasked = -2.0F;  // below every score and what stands for a score that is no number

}  // namespace

Router::Router(const RouterOptions& options, std::span<uint16_t> kept, ThreadPool* pool)
    : options_(options), pool_(pool), kept_(kept) {
  const auto experts = static_cast<size_t>(options.experts);
  const size_t threads = pool == nullptr ? 1 : static_cast<size_t>(pool->size());
  for (size_t i = 0; i < threads; ++i)
    rows_.push_back({std::vector<float>(experts), std::vector<float>(experts), std::vector<int32_t>(experts)});
}

void Router::keep(const Row& row, int64_t token) {
  constexpr float kUnits = 65535.0F;
  const auto experts = static_cast<size_t>(options_.experts);
  for (size_t e = 0; e < experts; ++e) {
    kept_[static_cast<size_t>(token) * experts + e] =
        static_cast<uint16_t>(std::clamp(row.scores[e], 0.0F, 1.0F) * kUnits + 0.5F);
  }
}

void Router::score(Row& row, const float* logits) const {
  std::vector<float>& scores = row.scores;
  const int32_t experts = options_.experts;
  if (options_.sigmoid) {
    for (int32_t e = 0; e < experts; ++e) scores[e] = 1.0F / (1.0F + exponential(-logits[e]));
  } else {
    float largest = -std::numeric_limits<float>::infinity();
    for (int32_t e = 0; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
    float sum = 0.0F;
    for (int32_t e = 0; e < experts; ++e) {
      scores[e] = exponential(logits[e] - largest);
      if (!std::isnan(scores[e])) sum += scores[e];
    }
    for (int32_t e = 0; e < experts; ++e) scores[e] /= sum;
  }
  for (float& value : scores) {
    if (std::isnan(value)) value = -1.0F;
  }
}

void Router::mask(Row& row, const RouterGroups& groups) const {
  std::vector<float>& scores = row.scores;
  std::vector<float>& best = row.best;
  std::vector<int32_t>& ranked = row.ranked;
  const int32_t size = options_.experts / groups.count;
  for (int32_t g = 0; g < groups.count; ++g) {
    best[g] = *std::max_element(scores.begin() + g * size, scores.begin() + (g + 1) * size);
  }
  const auto end = ranked.begin() + groups.count;
  std::iota(ranked.begin(), end, 0);
  std::sort(ranked.begin(), end,
            [&best](int32_t a, int32_t b) { return best[a] > best[b] || (best[a] == best[b] && a < b); });
  for (int32_t i = groups.top; i < groups.count; ++i) std::fill_n(scores.begin() + ranked[i] * size, size, kMasked);
}

void Router::route_token(Row& row, const float* logits, int64_t token, int32_t* ids, float* weights,
                         const RouterGroups& groups) {
  const int32_t top_k = options_.top_k;
  score(row, logits);
  if (!kept_.empty()) keep(row, token);
  if (groups.top < groups.count) mask(row, groups);
  int32_t filled = 0;
  for (int32_t e = 0; e < options_.experts; ++e) {
    const float value = row.scores[e];
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

void Router::route(const float* logits, int64_t n, int64_t stride, int32_t* ids, float* weights,
                   const RouterGroups& groups) {
  const auto threads = static_cast<int64_t>(rows_.size());
  auto share = [&](int32_t thread) {
    for (int64_t t = thread * n / threads; t < (thread + 1) * n / threads; ++t) {
      route_token(rows_[static_cast<size_t>(thread)], logits + t * stride, t, ids + t * options_.top_k,
                  weights + t * options_.top_k, groups);
    }
    return 0;
  };
  if (threads > 1 && n >= kTokensToShare) {
    pool_->run(static_cast<int32_t>(threads), share);
  } else {
    for (int32_t thread = 0; thread < threads; ++thread) share(thread);
  }
  if (!kept_.empty()) kept_count_ = static_cast<size_t>(n) * static_cast<size_t>(options_.experts);
}

}  // namespace cfmoe
