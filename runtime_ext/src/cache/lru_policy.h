// Least recently used: the victim is the resident whose last use lies furthest back.
#pragma once

#include "cache/cache_policy.h"
#include "cache/recency_list.h"

namespace cfmoe {

class LruPolicy final : public CachePolicy {
 public:
  explicit LruPolicy(const PolicyFacts& facts) : facts_(facts), list_(facts.total()) {}

  void on_access(ExpertKey key, uint64_t) override {
    list_.remove(facts_.id_of(key));
    list_.push_most_recent(facts_.id_of(key));
  }
  void on_insert(ExpertKey key, uint64_t) override { list_.push_most_recent(facts_.id_of(key)); }
  void on_evict(ExpertKey key) override { list_.remove(facts_.id_of(key)); }
  bool victim(ExpertKey, const Pinned& pinned, ExpertKey* out) override {
    const int32_t id = list_.least_recent([&](int32_t each) { return pinned(facts_.key_of(each)); });
    if (id >= 0) *out = facts_.key_of(id);
    return id >= 0;
  }
  void clear() override { list_.clear(); }

 private:
  PolicyFacts facts_;
  RecencyList list_;
};

}  // namespace cfmoe
