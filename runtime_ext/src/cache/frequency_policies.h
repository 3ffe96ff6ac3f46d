// Policies that keep what is used often: LFU, LFU with a quota per layer, and LRFU.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/cache_policy.h"
#include "cache/rank_tree.h"

namespace cfmoe {

// The victim has the fewest accesses; ties: the least recent. With history a count outlives eviction, without it an
// expert begins anew.
class LfuPolicy final : public CachePolicy {
 public:
  LfuPolicy(const PolicyFacts& facts, bool history);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void clear() override;

 private:
  PolicyFacts facts_;
  bool history_;
  uint64_t tick_ = 0;
  std::vector<double> counts_;
  RankTree residents_;
};

// LFU with history in which every layer owns an equal share of the slots: the victim is of the incoming expert's layer
// once that has its share, else of the layer furthest above its own.
class LayerLfuPolicy final : public CachePolicy {
 public:
  explicit LayerLfuPolicy(const PolicyFacts& facts);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void resize(int32_t slots) override { facts_.slots = slots; }
  void clear() override;

 private:
  struct Layer {
    RankTree residents;
    std::vector<double> counts;
    int32_t resident = 0;
  };
  int32_t share(int32_t layer) const;
  bool victim_of(int32_t layer, const Pinned& pinned, ExpertKey* out) const;

  PolicyFacts facts_;
  uint64_t tick_ = 0;
  std::vector<Layer> layers_;
};

// Least recently and frequently used (Lee et al., "LRFU", IEEE Transactions on Computers 50(12), 2001): every use
// counts, and counts half after kHandOverHalfLife tokens; uses outlive eviction. The sum of 2^-(age / half-life) is
// kept as log2(sum) + last position / half-life, in which form it changes with uses only.
class LrfuPolicy final : public CachePolicy {
 public:
  explicit LrfuPolicy(const PolicyFacts& facts);
  void on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                uint64_t position) override;
  void on_access(ExpertKey, uint64_t) override {}
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void clear() override;

 private:
  PolicyFacts facts_;
  std::vector<double> scores_;  // minus infinity: never used
  RankTree residents_;
};

}  // namespace cfmoe
