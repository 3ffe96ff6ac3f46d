// Predictions of reuse, and the scan for the longest wait.
#include "cache/predictive_policies.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace cfmoe {
namespace {

constexpr double kScoreUnits = 65535.0;
constexpr double kLeastReuse = 1e-9;  // keeps waits finite

// Half-lives in tokens. Uses within a few tokens say that a passage needs the expert, within a few sentences that the
// text does. Each was chosen on traces of the two shipped models and is flat around its optimum (docs/policies.md).
constexpr double kGateHalfLife = 16.0, kShortHalfLife = 3.0, kLongHalfLife = 48.0;
constexpr double kLearningRate = 0.05;

double keep_of(double half_life) { return std::exp2(-1.0 / half_life); }

}  // namespace

PredictivePolicy::PredictivePolicy(const PolicyFacts& facts) : facts_(facts) { PredictivePolicy::clear(); }

void PredictivePolicy::on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                                uint64_t) {
  if (scores.size() != static_cast<size_t>(facts_.experts))
    throw Error(ErrorKind::kInternal, "predictive policy: the router's scores are missing");
  std::fill(used_.begin(), used_.end(), uint8_t{0});
  for (const int32_t id : ids) used_[static_cast<size_t>(id)] = 1;
  const size_t first = static_cast<size_t>(layer) * scores.size();
  predict(layer, used_, scores, std::span(reuse_).subspan(first, scores.size()));
  for (size_t id = first; id < first + scores.size(); ++id) wait_[id] = 1.0 / std::max(reuse_[id], kLeastReuse);
}

void PredictivePolicy::on_insert(ExpertKey key, uint64_t) {
  place_[static_cast<size_t>(facts_.id_of(key))] = static_cast<int32_t>(residents_.size());
  residents_.push_back(key);
}

void PredictivePolicy::on_evict(ExpertKey key) {
  int32_t& place = place_[static_cast<size_t>(facts_.id_of(key))];
  residents_[static_cast<size_t>(place)] = residents_.back();
  place_[static_cast<size_t>(facts_.id_of(residents_.back()))] = place;
  residents_.pop_back();
  place = -1;
}

bool PredictivePolicy::victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) {
  for (int32_t layer = 0; layer < facts_.layers; ++layer) {
    const int32_t ahead = (layer - incoming.layer - 1 + facts_.layers) % facts_.layers;
    until_turn_[static_cast<size_t>(layer)] = static_cast<double>(ahead) / facts_.layers;
  }
  int32_t best = -1;
  double longest = 0;
  for (const ExpertKey key : residents_) {
    const int32_t id = facts_.id_of(key);
    const double wait = wait_[static_cast<size_t>(id)] + until_turn_[static_cast<size_t>(key.layer)];
    // Ties go to the lower id: the order of residents_ has no meaning.
    if (best >= 0 && (wait < longest || (wait == longest && id > best))) continue;
    if (pinned(key)) continue;
    best = id;
    longest = wait;
  }
  if (best >= 0) *out = facts_.key_of(best);
  return best >= 0;
}

void PredictivePolicy::clear() {
  const auto total = static_cast<size_t>(facts_.total());
  reuse_.assign(total, 0.0);
  wait_.assign(total, 1.0 / kLeastReuse);
  used_.assign(static_cast<size_t>(facts_.experts), 0);
  until_turn_.assign(static_cast<size_t>(facts_.layers), 0.0);
  residents_.clear();
  place_.assign(total, -1);
}

void GatePolicy::predict(int32_t, std::span<const uint8_t> used, std::span<const uint16_t> scores,
                         std::span<double> reuse) {
  const double keep = keep_of(kGateHalfLife);
  for (size_t e = 0; e < scores.size(); ++e)
    reuse[e] = keep * reuse[e] + (1 - keep) * 0.5 * (used[e] + scores[e] / kScoreUnits);
}

LearnedPolicy::LearnedPolicy(const PolicyFacts& facts) : PredictivePolicy(facts), log_odds_of_score_(65536) {
  // The floor keeps scores that round to zero comparable; it is a thirtieth of an even router's score.
  const double even = 1.0 / facts.experts, floor = even / 30;
  const double centre = std::log(even / (1 - even + floor));
  for (size_t score = 0; score < log_odds_of_score_.size(); ++score) {
    const double p = static_cast<double>(score) / kScoreUnits;
    log_odds_of_score_[score] = std::log((p + floor) / (1 - p + floor)) - centre;
  }
  LearnedPolicy::clear();
}

void LearnedPolicy::predict(int32_t layer, std::span<const uint8_t> used, std::span<const uint16_t> scores,
                            std::span<double> reuse) {
  const double keep_short = keep_of(kShortHalfLife), keep_long = keep_of(kLongHalfLife);
  Expert* const experts = experts_.data() + static_cast<size_t>(layer) * scores.size();
  if (seen_[static_cast<size_t>(layer)] != 0) {
    double gradient[kFeatures] = {};
    for (size_t e = 0; e < scores.size(); ++e) {
      const double error = used[e] - reuse[e];  // what the last token was told to expect
      for (int i = 0; i < kFeatures; ++i) gradient[i] += error * experts[e].features[i];
    }
    for (int i = 0; i < kFeatures; ++i) weights_[i] += kLearningRate * gradient[i] / static_cast<double>(scores.size());
  }
  seen_[static_cast<size_t>(layer)] = 1;
  for (size_t e = 0; e < scores.size(); ++e) {
    double* const x = experts[e].features;
    x[1] = log_odds_of_score_[scores[e]];
    x[2] = keep_short * x[2] + (1 - keep_short) * used[e];
    x[3] = keep_long * x[3] + (1 - keep_long) * used[e];
    double sum = 0;
    for (int i = 0; i < kFeatures; ++i) sum += weights_[i] * x[i];
    reuse[e] = 1 / (1 + std::exp(-sum));
  }
}

void LearnedPolicy::clear() {
  PredictivePolicy::clear();
  experts_.assign(static_cast<size_t>(facts_.total()), Expert{{1, 0, 0, 0}});
  seen_.assign(static_cast<size_t>(facts_.layers), 0);
  // Near what it learns on the two shipped models; the first is relative to the log odds of being among the top_k.
  const double share = std::min(static_cast<double>(facts_.top_k) / facts_.experts, 0.99);
  const double start[kFeatures] = {std::log(share / (1 - share)) - 0.75, 0.2, 0.8, 4.7};
  std::copy_n(start, kFeatures, weights_);
}

}  // namespace cfmoe
