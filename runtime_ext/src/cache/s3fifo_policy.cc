// The three queues of S3-FIFO.
#include "cache/s3fifo_policy.h"

#include <algorithm>

namespace cfmoe {
namespace {

constexpr uint8_t kMostUses = 3;
constexpr int32_t kSmallShare = 10;  // the small queue's target is a tenth of the slots, as in the paper

}  // namespace

S3FifoPolicy::S3FifoPolicy(const PolicyFacts& facts) : facts_(facts), items_(static_cast<size_t>(facts.total())) {}

void S3FifoPolicy::on_access(ExpertKey key, uint64_t) {
  Item& it = item(facts_.id_of(key));
  if (!it.fresh) it.uses = std::min<uint8_t>(static_cast<uint8_t>(it.uses + 1), kMostUses);
  it.fresh = false;
}

void S3FifoPolicy::on_insert(ExpertKey key, uint64_t) {
  const int32_t id = facts_.id_of(key);
  const bool returned = item(id).in_ghost;
  if (returned) ghost_.erase(std::find(ghost_.begin(), ghost_.end(), id));
  item(id) = Item{returned ? Place::kMain : Place::kSmall, true, false, 0};
  (returned ? main_ : small_).push_back(id);
}

void S3FifoPolicy::on_evict(ExpertKey key) {
  const int32_t id = facts_.id_of(key);
  const bool was_small = item(id).place == Place::kSmall;
  std::deque<int32_t>& queue = was_small ? small_ : main_;
  queue.erase(std::find(queue.begin(), queue.end(), id));
  item(id) = Item{};
  if (!was_small) return;
  item(id).in_ghost = true;
  ghost_.push_back(id);
  while (ghost_.size() > static_cast<size_t>(std::max(facts_.slots, 1))) {
    item(ghost_.front()).in_ghost = false;
    ghost_.pop_front();
  }
}

bool S3FifoPolicy::victim(ExpertKey, const Pinned& pinned, ExpertKey* out) {
  const auto movable = [&](int32_t id) { return !pinned(facts_.key_of(id)); };
  auto movable_small = std::count_if(small_.begin(), small_.end(), movable);
  auto movable_main = std::count_if(main_.begin(), main_.end(), movable);
  if (movable_small + movable_main == 0) return false;
  const auto small_target = static_cast<size_t>(std::max(1, facts_.slots / kSmallShare));
  // Every step finds the victim, takes a use from an expert or passes a pinned one by.
  for (;;) {
    const bool from_small = movable_small > 0 && (small_.size() > small_target || movable_main == 0);
    std::deque<int32_t>& queue = from_small ? small_ : main_;
    const int32_t id = queue.front();
    Item& it = item(id);
    if (movable(id) && it.uses == 0) {
      *out = facts_.key_of(id);
      return true;
    }
    queue.pop_front();
    if (!movable(id)) {
      queue.push_back(id);
      continue;
    }
    it.uses = from_small ? 0 : static_cast<uint8_t>(it.uses - 1);
    it.place = Place::kMain;
    main_.push_back(id);
    movable_small -= from_small ? 1 : 0;
    movable_main += from_small ? 1 : 0;
  }
}

void S3FifoPolicy::resize(int32_t slots) { facts_.slots = slots; }

void S3FifoPolicy::clear() {
  std::fill(items_.begin(), items_.end(), Item{});
  small_.clear();
  main_.clear();
  ghost_.clear();
}

}  // namespace cfmoe
