// The structures that policies find victims with, against the obvious way of doing the same.
#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "cache/rank_tree.h"
#include "cache/recency_list.h"
#include "simulate/future.h"

using namespace cfmoe;

namespace {

// Random ids below `size`, each excluded with a probability that differs from call to call.
std::vector<bool> random_subset(std::mt19937_64& random, int32_t size) {
  const uint64_t share = random() % 5;
  std::vector<bool> subset(static_cast<size_t>(size));
  for (size_t i = 0; i < subset.size(); ++i) subset[i] = random() % 4 < share;
  return subset;
}

}  // namespace

TEST_CASE("rank tree: as a scan finds it") {
  std::mt19937_64 random(1);
  for (const int32_t size : {1, 2, 3, 17, 64, 100}) {
    CAPTURE(size);
    RankTree tree(size);
    std::map<int32_t, Rank> naive;
    for (int step = 0; step < 2000; ++step) {
      const auto id = static_cast<int32_t>(random() % static_cast<uint64_t>(size));
      if (random() % 3 != 0) {
        // Few values, so that scores and ticks tie.
        const Rank rank{static_cast<double>(random() % 4) - 1.5, random() % 3};
        tree.set(id, rank);
        naive[id] = rank;
      } else {
        tree.remove(id);
        naive.erase(id);
      }
      if (step % 700 == 699) {
        tree.clear();
        naive.clear();
      }
      const std::vector<bool> excluded = random_subset(random, size);
      int32_t best = -1;
      for (const auto& [each, rank] : naive) {
        if (excluded[static_cast<size_t>(each)]) continue;
        if (best < 0 || std::tie(rank.score, rank.tick) < std::tie(naive[best].score, naive[best].tick)) best = each;
      }
      REQUIRE(tree.least([&](int32_t each) { return excluded[static_cast<size_t>(each)]; }) == best);
      REQUIRE(tree.contains(id) == (naive.count(id) > 0));
    }
  }
}

TEST_CASE("rank tree: asks about few more than the excluded") {
  RankTree tree(1024);
  const auto score = [](int32_t id) { return (id * 389 + 700) % 1024; };
  for (int32_t id = 0; id < 1024; ++id) tree.set(id, Rank{static_cast<double>(score(id)), 0});
  int asked = 0;
  const int32_t found = tree.least([&](int32_t id) { return ++asked, score(id) < 3; });
  CHECK(score(found) == 3);
  // A path of eleven nodes for each of the three, and beside it one node each.
  CHECK(asked <= 3 * 2 * 11);
}

TEST_CASE("recency list: as a list finds it") {
  std::mt19937_64 random(2);
  for (const int32_t size : {1, 2, 9, 50}) {
    CAPTURE(size);
    RecencyList list(size);
    std::vector<int32_t> naive;
    for (int step = 0; step < 2000; ++step) {
      const auto id = static_cast<int32_t>(random() % static_cast<uint64_t>(size));
      const auto place = std::find(naive.begin(), naive.end(), id);
      REQUIRE(list.contains(id) == (place != naive.end()));
      if (place != naive.end()) {
        list.remove(id);
        naive.erase(place);
      }
      if (random() % 3 != 0) {
        list.push_most_recent(id);
        naive.push_back(id);
      }
      if (step % 700 == 699) {
        list.clear();
        naive.clear();
      }
      const std::vector<bool> excluded = random_subset(random, size);
      const auto least =
          std::find_if(naive.begin(), naive.end(), [&](int32_t each) { return !excluded[static_cast<size_t>(each)]; });
      REQUIRE(list.least_recent([&](int32_t each) { return excluded[static_cast<size_t>(each)]; }) ==
              (least == naive.end() ? -1 : *least));
    }
  }
}

TEST_CASE("time set: as a set finds it") {
  std::mt19937_64 random(3);
  // One word to four levels of them, and sizes at the levels' edges.
  for (const uint64_t size : {1, 2, 63, 64, 65, 4095, 4096, 4097, 300000}) {
    CAPTURE(size);
    TimeSet set(size);
    std::set<uint64_t> naive;
    CHECK(set.greatest_below(size) == -1);
    for (int step = 0; step < 3000; ++step) {
      // Half of them near the upper end, so that some are taken out again.
      const uint64_t time = random() % 2 == 0 ? random() % size : size - 1 - random() % std::min<uint64_t>(size, 100);
      if (random() % 3 != 0) {
        set.insert(time);
        naive.insert(time);
      } else {
        set.erase(time);
        naive.erase(time);
      }
      if (step % 1400 == 1399) {
        set.clear();
        naive.clear();
      }
      for (const uint64_t limit : {random() % (size + 1), time, time + 1, size, size + 5000}) {
        const auto above = naive.lower_bound(limit);
        REQUIRE(set.greatest_below(limit) == (above == naive.begin() ? -1 : static_cast<int64_t>(*std::prev(above))));
      }
    }
  }
}

TEST_CASE("future: next and first uses") {
  std::mt19937_64 random(4);
  std::vector<uint32_t> order(500);
  for (uint32_t& id : order) id = static_cast<uint32_t>(random() % 40);
  const Future future(order, 50);
  CHECK(future.length() == 500);
  CHECK(future.total() == 50);
  const auto find = [&](uint32_t id, uint32_t from) {
    const auto place = std::find(order.begin() + from, order.end(), id);
    return place == order.end() ? Future::kNever : static_cast<uint32_t>(place - order.begin());
  };
  for (uint32_t time = 0; time < 500; ++time) {
    CHECK(future.id_at(time) == order[time]);
    CHECK(future.next(time) == find(order[time], time + 1));
  }
  for (uint32_t id = 0; id < 50; ++id) CHECK(future.first(id) == find(id, 0));
}
