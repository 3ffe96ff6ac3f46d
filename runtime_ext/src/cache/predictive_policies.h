// Policies that predict from the router's scores how soon an expert is used again.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/cache_policy.h"

namespace cfmoe {

// The victim is the resident with the longest expected wait, in tokens: 1/p for a use with probability p per token,
// plus the part of a token until its layer's turn. `p` of every expert is the derived class's to keep.
class PredictivePolicy : public CachePolicy {
 public:
  explicit PredictivePolicy(const PolicyFacts& facts);
  bool wants_scores() const override { return true; }
  void on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                uint64_t position) override;
  void on_access(ExpertKey, uint64_t) override {}
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void clear() override;

 protected:
  // One token's routing of one layer: `used` is 0 or 1 per expert. Turns the layer's reuse probabilities, which begin
  // as 0, into the new ones.
  virtual void predict(int32_t layer, std::span<const uint8_t> used, std::span<const uint16_t> scores,
                       std::span<double> reuse) = 0;

  PolicyFacts facts_;

 private:
  std::vector<double> reuse_, wait_;  // per expert: probability per token, and its inverse
  std::vector<uint8_t> used_;
  std::vector<double> until_turn_;  // per layer, in tokens, while a victim is sought
  std::vector<ExpertKey> residents_;
  std::vector<int32_t> place_;  // of an id among the residents; -1: absent
};

// The probability is a decayed mean, half of it over the router's score of the expert and half over its uses.
class GatePolicy final : public PredictivePolicy {
 public:
  using PredictivePolicy::PredictivePolicy;

 protected:
  void predict(int32_t layer, std::span<const uint8_t> used, std::span<const uint16_t> scores,
               std::span<double> reuse) override;
};

// The probability is a logistic regression that learns while the model runs: from a short and a long decayed mean of an
// expert's uses, and from the log odds of its last score, to whether the next token uses it. Weights are shared by all
// experts and take one step of gradient descent per token and layer, in prefill too, so that the cache fits itself to
// the model and the text.
class LearnedPolicy final : public PredictivePolicy {
 public:
  explicit LearnedPolicy(const PolicyFacts& facts);
  void clear() override;

 protected:
  void predict(int32_t layer, std::span<const uint8_t> used, std::span<const uint16_t> scores,
               std::span<double> reuse) override;

 private:
  static constexpr int kFeatures = 4;
  struct Expert {
    double features[kFeatures];
  };

  std::vector<double> log_odds_of_score_;  // by score, centred on an even router's
  std::vector<Expert> experts_;
  std::vector<uint8_t> seen_;  // per layer
  double weights_[kFeatures];
};

}  // namespace cfmoe
