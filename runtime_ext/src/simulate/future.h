// What oracle policies know: the whole sequence of accesses, and when each expert comes next.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace cfmoe {

class Future {
 public:
  static constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();

  // `order[t]` is the id, below `total`, of the expert accessed at time t.
  Future(std::vector<uint32_t> order, int32_t total);

  uint32_t length() const { return static_cast<uint32_t>(order_.size()); }
  uint32_t id_at(uint32_t time) const { return order_[time]; }
  // The next access to the same expert, or kNever.
  uint32_t next(uint32_t time) const { return next_[time]; }
  // The first access to an expert, or kNever.
  uint32_t first(uint32_t id) const { return first_[id]; }
  uint32_t total() const { return static_cast<uint32_t>(first_.size()); }

 private:
  std::vector<uint32_t> order_, next_, first_;
};

// Where the simulator stands. Times above `now` are the future; from `horizon` on nothing is foreseen, because the
// cache is emptied there.
struct Clock {
  int64_t now = -1;
  uint32_t horizon = 0;
};

// A set of times that finds its greatest member at once: a bitmap of bitmaps.
class TimeSet {
 public:
  explicit TimeSet(uint64_t size);
  void insert(uint64_t time);
  void erase(uint64_t time);
  void clear();
  // The greatest member below `limit`; -1 if there is none.
  int64_t greatest_below(uint64_t limit) const;

 private:
  uint64_t size_;
  std::vector<std::vector<uint64_t>> levels_;  // a bit of level n + 1 says that a word of level n is not zero
};

}  // namespace cfmoe
