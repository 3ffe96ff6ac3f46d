// Least recently used: the victim is the resident whose last use lies furthest back.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cache/cache_policy.h"

namespace cfmoe {

class LruPolicy final : public CachePolicy {
 public:
  LruPolicy(int32_t layers, int32_t experts);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(const std::function<bool(ExpertKey)>& pinned, ExpertKey* out) const override;
  void clear() override;

 private:
  // A ring of all experts that are resident, through `head_`: next of it is the least recent, previous of it the most
  // recent.
  struct Node {
    int32_t previous = -1, next = -1;  // -1: not resident
  };
  int32_t id_of(ExpertKey key) const;
  bool linked(int32_t id) const { return nodes_[static_cast<size_t>(id)].next >= 0; }
  void link_most_recent(int32_t id);
  void unlink(int32_t id);

  int32_t layers_, experts_;
  int32_t head_;
  std::vector<Node> nodes_;
};

}  // namespace cfmoe
