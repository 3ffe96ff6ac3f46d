// Decides which resident expert makes room. Shared by the engine and the simulator.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/expert_key.h"

namespace cfmoe {

// What a policy knows of the model and of its cache.
struct PolicyFacts {
  int32_t layers = 0;   // MoE layers
  int32_t experts = 0;  // of one layer
  int32_t top_k = 0;
  int32_t slots = 0;

  int32_t total() const { return layers * experts; }
  int32_t id_of(ExpertKey key) const { return key.layer * experts + key.expert; }
  ExpertKey key_of(int32_t id) const { return ExpertKey{id / experts, id % experts}; }
};

// Calls come in the order of accounting (see Residency), and a policy's answers are a pure function of them. Positions
// are those of tokens in the context; they need not ascend.
class CachePolicy {
 public:
  using Pinned = std::function<bool(ExpertKey)>;

  virtual ~CachePolicy() = default;
  // The router has chosen for one token: `ids` best first; `scores` of all experts in units of 1/65535, empty unless
  // wants_scores(). Comes before the accesses of that token, in prefill once per token too.
  virtual void on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                        uint64_t position) {
    (void)layer, (void)ids, (void)scores, (void)position;
  }
  virtual bool wants_scores() const { return false; }

  // A resident expert was used. The first access follows its insertion.
  virtual void on_access(ExpertKey key, uint64_t position) = 0;
  virtual void on_insert(ExpertKey key, uint64_t position) = 0;
  virtual void on_evict(ExpertKey key) = 0;

  // Whether a full cache should give up an expert for this one. Only oracles say no; the engine has to compute from
  // somewhere.
  virtual bool admits(ExpertKey key) {
    (void)key;
    return true;
  }
  // The resident to give up for `incoming` among those for which `pinned` is false. False if every resident is pinned.
  virtual bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) = 0;

  virtual void resize(int32_t slots) { (void)slots; }
  virtual void clear() = 0;
};

// What the engine uses unless told otherwise: docs/policies.md says what decided.
inline constexpr const char* kDefaultPolicy = "learned";

// A realisable policy by name. Throws cfmoe::Error listing the known names.
std::unique_ptr<CachePolicy> make_policy(const std::string& name, const PolicyFacts& facts);
std::vector<std::string> policy_names();

}  // namespace cfmoe
