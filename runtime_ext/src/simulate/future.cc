// Next uses, computed once backwards, and the hierarchical bitmap.
#include "simulate/future.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace cfmoe {
namespace {

constexpr uint64_t kBits = 64;

}  // namespace

Future::Future(std::vector<uint32_t> order, int32_t total)
    : order_(std::move(order)), next_(order_.size()), first_(static_cast<size_t>(total), kNever) {
  for (uint32_t time = length(); time-- > 0;) next_[time] = std::exchange(first_[order_[time]], time);
}

// A level has a word for its size itself too, so that a search may begin there.
TimeSet::TimeSet(uint64_t size) : size_(size) {
  do {
    size = size / kBits + 1;
    levels_.emplace_back(size);
  } while (size > 1);
}

void TimeSet::insert(uint64_t time) {
  for (std::vector<uint64_t>& level : levels_) {
    level[time / kBits] |= uint64_t{1} << (time % kBits);
    time /= kBits;
  }
}

void TimeSet::erase(uint64_t time) {
  for (std::vector<uint64_t>& level : levels_) {
    uint64_t& word = level[time / kBits];
    word &= ~(uint64_t{1} << (time % kBits));
    if (word != 0) return;
    time /= kBits;
  }
}

void TimeSet::clear() {
  for (std::vector<uint64_t>& level : levels_) std::fill(level.begin(), level.end(), 0);
}

int64_t TimeSet::greatest_below(uint64_t limit) const {
  limit = std::min(limit, size_);
  for (size_t level = 0; level < levels_.size(); ++level) {
    const uint64_t place = limit / kBits;
    const uint64_t below = levels_[level][place] & ((uint64_t{1} << (limit % kBits)) - 1);
    if (below != 0) {
      uint64_t found = place * kBits + static_cast<uint64_t>(std::bit_width(below)) - 1;
      while (level-- > 0) found = found * kBits + static_cast<uint64_t>(std::bit_width(levels_[level][found])) - 1;
      return static_cast<int64_t>(found);
    }
    limit = place;
  }
  return -1;
}

}  // namespace cfmoe
