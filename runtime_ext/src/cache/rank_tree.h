// Finds the least ranked of a set of ids while ranks change: a tournament tree over all ids.
#pragma once

#include <cstdint>
#include <vector>

namespace cfmoe {

// Ordered by score, then by tick; equal ranks by id.
struct Rank {
  double score = 0;
  uint64_t tick = 0;
};

class RankTree {
 public:
  explicit RankTree(int32_t size) : ranks_(static_cast<size_t>(size)) {
    while (leaves_ < size) leaves_ *= 2;
    clear();
  }

  void clear() { winners_.assign(2 * static_cast<size_t>(leaves_), -1); }
  bool contains(int32_t id) const { return winners_[static_cast<size_t>(leaves_ + id)] >= 0; }
  // Adds the id, or changes its rank.
  void set(int32_t id, Rank rank) {
    ranks_[static_cast<size_t>(id)] = rank;
    winners_[static_cast<size_t>(leaves_ + id)] = id;
    replay(id);
  }
  void remove(int32_t id) {
    winners_[static_cast<size_t>(leaves_ + id)] = -1;
    replay(id);
  }
  // The least ranked id for which `excluded(id)` is false; -1 if there is none. Looks only at paths to excluded ids.
  template <typename Excluded>
  int32_t least(const Excluded& excluded) const {
    return least_below(1, excluded);
  }

 private:
  int32_t winner(int32_t node) const { return winners_[static_cast<size_t>(node)]; }
  int32_t better(int32_t a, int32_t b) const {
    if (a < 0 || b < 0) return a < 0 ? b : a;
    const Rank &left = ranks_[static_cast<size_t>(a)], &right = ranks_[static_cast<size_t>(b)];
    if (left.score != right.score) return left.score < right.score ? a : b;
    if (left.tick != right.tick) return left.tick < right.tick ? a : b;
    return a < b ? a : b;
  }
  void replay(int32_t id) {
    for (int32_t node = (leaves_ + id) / 2; node > 0; node /= 2)
      winners_[static_cast<size_t>(node)] = better(winner(2 * node), winner(2 * node + 1));
  }
  template <typename Excluded>
  int32_t least_below(int32_t node, const Excluded& excluded) const {
    const int32_t first = winner(node);
    if (first < 0 || !excluded(first)) return first;
    if (node >= leaves_) return -1;
    return better(least_below(2 * node, excluded), least_below(2 * node + 1, excluded));
  }

  int32_t leaves_ = 1;
  std::vector<Rank> ranks_;
  std::vector<int32_t> winners_;  // a binary heap's layout: the root at 1, leaves from leaves_
};

}  // namespace cfmoe
