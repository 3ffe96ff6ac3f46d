// S3-FIFO: a small queue that new experts must survive, a main queue, and a memory of the recently evicted.
//
// Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Adapted to a cache that must admit and may
// pin: what the small queue gives up is the victim, never refused at the door, and pinned experts go round.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "cache/cache_policy.h"

namespace cfmoe {

class S3FifoPolicy final : public CachePolicy {
 public:
  explicit S3FifoPolicy(const PolicyFacts& facts);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void resize(int32_t slots) override;
  void clear() override;

 private:
  enum class Place : uint8_t { kOut, kSmall, kMain };
  struct Item {
    Place place = Place::kOut;
    bool fresh = false;     // the access that comes with insertion says nothing
    bool in_ghost = false;  // remembered as evicted
    uint8_t uses = 0;       // since insertion or the last reprieve, at most 3
  };
  Item& item(int32_t id) { return items_[static_cast<size_t>(id)]; }

  PolicyFacts facts_;
  std::vector<Item> items_;
  std::deque<int32_t> small_, main_, ghost_;  // fronts are oldest
};

}  // namespace cfmoe
