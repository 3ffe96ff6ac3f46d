// The cache policies by name.
#include "cache/cache_policy.h"

#include "cache/lru_policy.h"
#include "error.h"

namespace cfmoe {
namespace {

struct PolicyEntry {
  const char* name;
  std::unique_ptr<CachePolicy> (*make)(int32_t layers, int32_t experts);
};

constexpr PolicyEntry kPolicies[] = {
    {"lru",
     [](int32_t layers, int32_t experts) -> std::unique_ptr<CachePolicy> {
       return std::make_unique<LruPolicy>(layers, experts);
     }},
};

}  // namespace

std::unique_ptr<CachePolicy> make_policy(const std::string& name, int32_t layers, int32_t experts) {
  for (const PolicyEntry& entry : kPolicies) {
    if (name == entry.name) return entry.make(layers, experts);
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
