// Decides which resident expert makes room. Shared by the engine and the simulator.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cache/expert_key.h"

namespace cfmoe {

class CachePolicy {
 public:
  virtual ~CachePolicy() = default;
  // A resident expert was used by the token at `position`. The first access follows its insertion.
  virtual void on_access(ExpertKey key, uint64_t position) = 0;
  virtual void on_insert(ExpertKey key, uint64_t position) = 0;
  virtual void on_evict(ExpertKey key) = 0;
  // The resident to give up among those for which `pinned` is false; a pure function of the calls so far. False if
  // every resident is pinned.
  virtual bool victim(const std::function<bool(ExpertKey)>& pinned, ExpertKey* out) const = 0;
  virtual void clear() = 0;
};

// Throws cfmoe::Error listing the known names.
std::unique_ptr<CachePolicy> make_policy(const std::string& name, int32_t layers, int32_t experts);
std::vector<std::string> policy_names();

}  // namespace cfmoe
