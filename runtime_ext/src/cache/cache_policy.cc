// The cache policies by name.
#include "cache/cache_policy.h"

#include "cache/frequency_policies.h"
#include "cache/lru_policy.h"
#include "cache/predictive_policies.h"
#include "cache/s3fifo_policy.h"
#include "error.h"

namespace cfmoe {
namespace {

using PolicyPtr = std::unique_ptr<CachePolicy>;

struct PolicyEntry {
  const char* name;
  PolicyPtr (*make)(const PolicyFacts& facts);
};

constexpr PolicyEntry kPolicies[] = {
    {"lru", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LruPolicy>(facts); }},
    {"lfu", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LfuPolicy>(facts, false); }},
    {"lfu-history", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LfuPolicy>(facts, true); }},
    {"lfu-layer", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LayerLfuPolicy>(facts); }},
    {"lrfu", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LrfuPolicy>(facts); }},
    {"s3fifo", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<S3FifoPolicy>(facts); }},
    {"gate", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<GatePolicy>(facts); }},
    {"learned", [](const PolicyFacts& facts) -> PolicyPtr { return std::make_unique<LearnedPolicy>(facts); }},
};

}  // namespace

std::unique_ptr<CachePolicy> make_policy(const std::string& name, const PolicyFacts& facts) {
  for (const PolicyEntry& entry : kPolicies) {
    if (name == entry.name) return entry.make(facts);
  }
  std::string known;
  for (const std::string& each : policy_names()) known += (known.empty() ? "" : ", ") + each;
  throw Error("cache policy \"" + name + "\" is unknown; use one of: " + known);
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const PolicyEntry& entry : kPolicies) names.emplace_back(entry.name);
  return names;
}

}  // namespace cfmoe
