// Replays a routing trace against a cache of some size: the engine's decisions without its memory.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/residency.h"
#include "simulate/future.h"
#include "trace/trace.h"

namespace cfmoe {

struct SimulatorOptions {
  // One sequential stream of accesses without pinning, prefill treated like decode, every size from 0 allowed: what the
  // literature simulates. Otherwise what the engine does: prefill layer by layer and chunk by chunk, hand-over, groups.
  bool reference = false;
  bool warm = false;        // keep the cache from sample to sample
  uint32_t chunk_size = 0;  // of prefill; 0: the trace's, or 256 where it has none
};

struct Simulation {
  AccessCounts prefill, decode;
  uint64_t hand_over_loads = 0;  // reads that belong to prefill and are no accesses
  // How many decode groups, (token, layer) pairs, had 0, 1, … top_k misses.
  std::vector<uint64_t> decode_groups_by_misses;
};

class Simulator {
 public:
  static constexpr uint32_t kDefaultChunk = 256;
  // Of all layers. Far more than any model has; policies keep up to a hundred bytes for each, and the format would
  // allow a trace of two kilobytes to name 67 million.
  static constexpr int32_t kMostExperts = 1 << 20;

  // Throws cfmoe::Error where the trace cannot be replayed so.
  Simulator(const Trace& trace, const SimulatorOptions& options);

  // `policy` is one of make_policy's, "opt", "opt-bypass" or "lopt"; `lookahead`, in accesses, is lopt's. A cache of
  // all experts is the largest there is. Throws cfmoe::Error where policy or size do not fit. May be called from
  // several threads at once.
  Simulation run(const std::string& policy, int64_t slots, uint32_t lookahead) const;

  // make_policy's names and the oracles.
  static std::vector<std::string> policy_names();

 private:
  // What the engine would do next. The reference knows samples and groups only.
  struct Step {
    enum class Kind : uint8_t { kSample, kPrefillLayer, kHandOver, kGroup } kind;
    int32_t layer = 0;
    uint32_t first_token = 0, tokens = 0;
    uint32_t experts_begin = 0, experts_end = 0;  // of prefill, into chunk_experts_
    uint32_t last_time = 0;                       // of its accesses, for oracles; of a sample, of all of its accesses
  };
  class Replay;

  void plan(const Trace& trace);
  void plan_prefill_layer(int32_t layer, uint32_t first_token, uint32_t tokens);
  void plan_group(int32_t layer, uint32_t token);
  void end_sample(size_t sample_step);
  std::unique_ptr<CachePolicy> policy(const std::string& name, const PolicyFacts& facts, uint32_t lookahead,
                                      const Clock& clock) const;
  std::span<const int32_t> ids(int32_t layer, uint32_t token, uint32_t tokens) const;
  std::span<const uint16_t> scores(int32_t layer, uint32_t token, uint32_t tokens) const;

  SimulatorOptions options_;
  int32_t layers_, experts_, top_k_;
  uint32_t tokens_;
  std::vector<int32_t> ids_;        // [layer][token][k]
  std::vector<uint16_t> scores_;    // [layer][token][expert], or empty
  std::vector<uint64_t> position_;  // of each token; ascending over samples where the cache stays warm
  std::vector<Phase> phase_;        // of each token
  std::vector<Step> steps_;
  std::vector<int32_t> chunk_experts_;
  std::vector<uint64_t> chunk_last_positions_;
  std::vector<uint32_t> order_;  // while planning
  std::unique_ptr<Future> future_;
};

}  // namespace cfmoe
