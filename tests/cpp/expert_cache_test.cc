// The expert cache: what is computed and when, what is read, what stays, and what failures leave behind.
#include "cache/expert_cache.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>

#include "expect_error.h"
#include "fake_store.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

ExpertCacheOptions with_slots(int32_t slots) {
  ExpertCacheOptions options;
  options.slots = slots;
  options.policy = "lru";
  options.log_events = true;
  return options;
}

// Checks that every expert is computed exactly once and finds its own record; returns the experts in the order of
// computing.
struct Computed {
  int32_t layer;
  std::vector<int32_t> experts;
  std::vector<int32_t> order;
  std::vector<size_t> batches;

  ExpertCache::ComputeFn function() {
    return [this](std::span<const ReadyExpert> batch) {
      batches.push_back(batch.size());
      for (const ReadyExpert& ready : batch) {
        int32_t expert = experts.at(static_cast<size_t>(ready.index));
        const auto* bytes = static_cast<const char*>(ready.view.base) + int64_t{ready.view.word_offset} * 4;
        bool own = true;
        for (uint64_t i = 0; i < kBytes; i += 512) own = own && bytes[i] == FakeStore::id_of({layer, expert});
        CHECK(own);
        CHECK(ready.view.word_offset + int64_t{kBytes / 4} <= ready.view.extent_words);
        order.push_back(expert);
      }
    };
  }
  void check_each_once() const {
    std::vector<int32_t> sorted = order, wanted = experts;
    std::sort(sorted.begin(), sorted.end());
    std::sort(wanted.begin(), wanted.end());
    CHECK(sorted == wanted);
  }
};

std::vector<int32_t> prefill(ExpertCache& cache, int32_t layer, std::vector<int32_t> experts, uint64_t position = 0) {
  Computed computed{layer, experts, {}, {}};
  std::vector<uint64_t> positions(experts.size(), position);
  cache.prefill_layer(layer, experts, positions, computed.function());
  computed.check_each_once();
  return computed.order;
}

std::vector<int32_t> decode(ExpertCache& cache, int32_t layer, std::vector<int32_t> experts, uint64_t position) {
  Computed computed{layer, experts, {}, {}};
  cache.decode_group(layer, experts, position, computed.function());
  computed.check_each_once();
  return computed.order;
}

std::vector<int32_t> neighbours(uint64_t position) {
  return {static_cast<int32_t>(position * 3 % kManyExperts), static_cast<int32_t>((position * 3 + 1) % kManyExperts)};
}

using Residents = std::vector<std::vector<int32_t>>;

Residents residents_of(const ExpertCache& cache) {
  Residents out;
  for (int32_t layer = 0; layer < kManyLayers; ++layer) out.push_back(cache.residents(layer));
  return out;
}

// Two turns of prefill, hand-over and decode with routing from `seed`; returns the residents after every step.
std::vector<Residents> run_turns(ExpertCache& cache, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto some = [&](size_t least) {
    std::set<int32_t> experts;
    while (experts.size() < least) experts.insert(static_cast<int32_t>(random() % kManyExperts));
    return std::vector<int32_t>(experts.begin(), experts.end());
  };
  std::vector<Residents> history;
  uint64_t position = 0;
  for (int turn = 0; turn < 2; ++turn) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      for (int32_t layer = 0; layer < kManyLayers; ++layer) {
        std::vector<int32_t> experts = some(2 + random() % 6);
        std::vector<int32_t> ids;
        for (size_t token = 0; token + 1 < experts.size(); ++token)
          ids.insert(ids.end(), {experts[token], experts[token + 1]});
        std::vector<uint64_t> last(experts.size());
        for (size_t i = 0; i < experts.size(); ++i) last[i] = position + std::min(i, experts.size() - 2);
        Computed computed{layer, experts, {}, {}};
        cache.prefill_layer(layer, experts, last, computed.function());
        computed.check_each_once();
        cache.note_routing(Phase::kPrefill, layer, ids, {}, position);
        history.push_back(residents_of(cache));
      }
      position += 8;
    }
    cache.hand_over();
    history.push_back(residents_of(cache));
    for (int token = 0; token < 12; ++token, ++position) {
      for (int32_t layer = 0; layer < kManyLayers; ++layer) {
        std::vector<int32_t> experts = some(kTopK);
        if (random() % 2 == 0) std::swap(experts[0], experts[1]);
        decode(cache, layer, experts, position);
        history.push_back(residents_of(cache));
      }
    }
  }
  return history;
}

}  // namespace

TEST_CASE("expert cache: prefill computes residents first, each once, each read once") {
  FakeStore store;
  ExpertCache cache(store, kTopK, with_slots(4));
  CHECK(cache.pool_bytes() == 4 * kBytes);
  CHECK(prefill(cache, 0, {1, 3, 5}) == std::vector<int32_t>{1, 3, 5});
  CHECK(prefill(cache, 0, {0, 3, 4, 5, 7}) == std::vector<int32_t>{3, 5, 0, 4, 7});
  CHECK(store.total_reads() == 6);
  CHECK(cache.metrics(Phase::kPrefill).hits == 2);
  CHECK(cache.metrics(Phase::kPrefill).misses == 6);
  CHECK(cache.metrics(Phase::kPrefill).bytes_read == 6 * (kBytes + 7));
  CHECK(cache.metrics(Phase::kDecode).hits + cache.metrics(Phase::kDecode).misses == 0);
  // LRU with 4 slots. Before: {1, 3, 5} and one free slot. Expert 0 takes the free slot, 4 the unpinned 1. Then 3
  // completes, oldest unpinned: 7 takes its place. Left: 5, 0, 4, 7.
  CHECK(cache.residents(0) == std::vector<int32_t>{0, 4, 5, 7});
}

TEST_CASE("expert cache: every expert of a layer through the smallest cache") {
  for (IoMode mode : {IoMode::kDirect, IoMode::kMmap}) {
    FakeStore store(mode);
    ExpertCache cache(store, kTopK, with_slots(kTopK));
    for (int chunk = 0; chunk < 2; ++chunk) {
      for (int32_t layer = 0; layer < kManyLayers; ++layer) prefill(cache, layer, {0, 1, 2, 3, 4, 5, 6, 7});
    }
    CHECK(store.total_reads() == 2 * kManyLayers * kManyExperts);
    for (uint64_t position = 0; position < 20; ++position) decode(cache, 0, neighbours(position), position);
    cache.drain();
    if (mode == IoMode::kMmap) {
      CHECK(cache.pool_bytes() == 0);
      CHECK(store.mapped() == kTopK);
    }
  }
}

TEST_CASE("expert cache: a decode group pins its hits and evicts in recency order") {
  FakeStore store;
  ExpertCache cache(store, kTopK, with_slots(3));
  decode(cache, 0, {0, 1}, 0);
  decode(cache, 1, {4, 5}, 1);  // 4 takes the free slot, 5 the place of (0, 0)
  CHECK(residents_of(cache) == Residents{{1}, {4, 5}, {}});
  // (0, 1) is the oldest but a member: (1, 4) goes. The hit is computed first although it is second in top-k order.
  CHECK(decode(cache, 0, {6, 1}, 2) == std::vector<int32_t>{1, 6});
  CHECK(residents_of(cache) == Residents{{1, 6}, {5}, {}});
  // Recency is in top-k order, 6 before 1: after (1, 5), 6 is the next to go.
  decode(cache, 2, {0, 1}, 3);
  CHECK(residents_of(cache) == Residents{{1}, {}, {0, 1}});
  const PhaseMetrics& metrics = cache.metrics(Phase::kDecode);
  CHECK(metrics.hits == 1);
  CHECK(metrics.misses == 7);
  CHECK(metrics.bytes_read == 7 * (kBytes + 7));
  std::vector<AccessEvent> events = cache.take_events();
  REQUIRE(events.size() == 8);
  CHECK(events[4].key == ExpertKey{0, 6});
  CHECK(!events[4].hit);
  CHECK(events[5].key == ExpertKey{0, 1});
  CHECK(events[5].hit);
  CHECK(events[5].position == 2);
  CHECK(cache.take_events().empty());
}

TEST_CASE("expert cache: residents do not depend on how fast loads complete") {
  for (int32_t slots : {2, 3, 5, 9, 16, 24}) {
    for (IoMode mode : {IoMode::kDirect, IoMode::kMmap}) {
      std::vector<Residents> first;
      for (int round = 0; round < 3; ++round) {
        FakeStore store(mode);
        store.max_sleep_us = round == 0 ? 0 : 800;
        store.seed = static_cast<uint64_t>(round) * 1000;
        ExpertCacheOptions options = with_slots(slots);
        options.io_threads = round + 1;
        ExpertCache cache(store, kTopK, options);
        std::vector<Residents> history = run_turns(cache, 42);
        if (round == 0) first = history;
        CHECK(history == first);
        for (const Residents& residents : history) {
          CHECK(residents[0].size() + residents[1].size() + residents[2].size() <= static_cast<size_t>(slots));
        }
      }
    }
  }
}

TEST_CASE("expert cache: events equal metrics") {
  FakeStore store;
  ExpertCache cache(store, kTopK, with_slots(6));
  run_turns(cache, 7);
  cache.drain();
  std::map<std::pair<Phase, bool>, uint64_t> counts;
  for (const AccessEvent& event : cache.take_events()) ++counts[{event.phase, event.hit}];
  for (Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    CHECK(counts[{phase, true}] == cache.metrics(phase).hits);
    CHECK(counts[{phase, false}] == cache.metrics(phase).misses);
  }
  uint64_t bytes = cache.metrics(Phase::kPrefill).bytes_read + cache.metrics(Phase::kDecode).bytes_read;
  CHECK(bytes == static_cast<uint64_t>(store.total_reads()) * (kBytes + 7));
  CHECK(cache.metrics(Phase::kDecode).bytes_read == cache.metrics(Phase::kDecode).misses * (kBytes + 7));
  cache.reset_metrics();
  CHECK(cache.metrics(Phase::kDecode).hits == 0);
  CHECK(cache.metrics(Phase::kPrefill).bytes_read == 0);
}

TEST_CASE("expert cache: hand-over seeds what the prompt's end used") {
  FakeStore store;
  ExpertCache cache(store, kTopK, with_slots(4));
  prefill(cache, 0, {0, 1, 2, 3});
  cache.note_routing(Phase::kPrefill, 0, std::vector<int32_t>{0, 1, 2, 3}, {}, 0);
  prefill(cache, 1, {4, 5, 6});
  cache.note_routing(Phase::kPrefill, 1, std::vector<int32_t>{4, 5, 5, 6}, {}, 0);
  CHECK(residents_of(cache) == Residents{{3}, {4, 5, 6}, {}});
  // Best four: (1, 5) twice; then of the last token (0, 2), (0, 3), (1, 6). Only (0, 2) is absent, (1, 4) makes room.
  store.max_sleep_us = 30000;
  cache.hand_over();
  CHECK(residents_of(cache) == Residents{{2, 3}, {5, 6}, {}});
  // Still loading or not: a hit.
  decode(cache, 0, {2, 3}, 2);
  CHECK(cache.metrics(Phase::kDecode).hits == 2);
  CHECK(cache.metrics(Phase::kDecode).bytes_read == 0);
  CHECK(cache.metrics(Phase::kPrefill).misses == 7);
  CHECK(cache.metrics(Phase::kPrefill).bytes_read == 8 * (kBytes + 7));
  // A second hand-over without a prompt changes nothing.
  cache.hand_over();
  CHECK(store.total_reads() == 8);
}

TEST_CASE("expert cache: waiting is counted as a stall") {
  FakeStore store;
  store.max_sleep_us = 3000;
  ExpertCache cache(store, kTopK, with_slots(4));
  for (uint64_t position = 0; position < 4; ++position)
    decode(cache, static_cast<int32_t>(position % 3), {0, 1}, position);
  CHECK(cache.metrics(Phase::kDecode).stall_ns > 0);
  CHECK(cache.metrics(Phase::kPrefill).stall_ns == 0);
}

TEST_CASE("expert cache: a failed load throws and leaves the cache consistent") {
  for (IoMode mode : {IoMode::kDirect, IoMode::kMmap}) {
    FakeStore store(mode);
    store.max_sleep_us = 300;
    ExpertCache cache(store, kTopK, with_slots(3));
    store.failing = FakeStore::id_of({0, 4});
    expect_error([&] { decode(cache, 0, {4, 5}, 0); }, {"expert 4 is damaged"});
    std::vector<int32_t> left = cache.residents(0);
    CHECK(std::find(left.begin(), left.end(), 4) == left.end());
    expect_error([&] { prefill(cache, 0, {0, 1, 2, 3, 4, 5, 6, 7}); }, {"expert 4 is damaged"});
    left = cache.residents(0);
    CHECK(std::find(left.begin(), left.end(), 4) == left.end());
    // In the background: whoever waits next learns of it.
    cache.clear();
    cache.note_routing(Phase::kPrefill, 0, std::vector<int32_t>{4, 5}, {}, 0);
    cache.hand_over();
    expect_error([&] { cache.drain(); }, {"expert 4 is damaged"});
    CHECK(cache.residents(0) == std::vector<int32_t>{5});
    cache.drain();
    store.failing = -1;
    for (uint64_t position = 0; position < 8; ++position) decode(cache, 0, neighbours(position), position);
    prefill(cache, 0, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(cache.residents(0).size() == 3);
  }
}

TEST_CASE("expert cache: a compute that throws leaves the cache usable") {
  FakeStore store;
  store.max_sleep_us = 300;
  ExpertCache cache(store, kTopK, with_slots(3));
  auto thrower = [](std::span<const ReadyExpert>) { throw Error(ErrorKind::kCancelled, "cancelled"); };
  std::vector<int32_t> experts = {0, 1, 2, 3, 4};
  std::vector<uint64_t> positions(5, 0);
  expect_error([&] { cache.prefill_layer(0, experts, positions, thrower); }, {"cancelled"});
  expect_error([&] { cache.decode_group(1, std::vector<int32_t>{6, 7}, 1, thrower); }, {"cancelled"});
  prefill(cache, 0, experts);
  for (uint64_t position = 0; position < 8; ++position) decode(cache, 1, {6, 7}, position);
}

TEST_CASE("expert cache: clear makes it cold") {
  for (IoMode mode : {IoMode::kDirect, IoMode::kMmap}) {
    FakeStore store(mode);
    store.max_sleep_us = 500;
    ExpertCache cache(store, kTopK, with_slots(5));
    std::vector<Residents> first = run_turns(cache, 3);
    cache.clear();
    CHECK(residents_of(cache) == Residents{{}, {}, {}});
    CHECK(store.mapped() == 0);
    CHECK(run_turns(cache, 3) == first);
  }
}

TEST_CASE("expert cache: resize") {
  FakeStore store;
  ExpertCache cache(store, kTopK, with_slots(100));
  CHECK(cache.slots() == kManyLayers * kManyExperts);
  prefill(cache, 0, {0, 1, 2, 3, 4, 5});
  cache.resize(3);
  CHECK(cache.slots() == 3);
  CHECK(cache.pool_bytes() == 3 * kBytes);
  CHECK(cache.residents(0) == std::vector<int32_t>{3, 4, 5});
  decode(cache, 0, {3, 7}, 1);
  CHECK(cache.metrics(Phase::kDecode).hits == 1);
  CHECK(cache.residents(0) == std::vector<int32_t>{3, 5, 7});
  cache.resize(6);
  prefill(cache, 1, {0, 1, 2});
  CHECK(residents_of(cache) == Residents{{3, 5, 7}, {0, 1, 2}, {}});
  expect_error([&] { cache.resize(1); }, {"cache of 1 experts", "use at least 2"});
}

TEST_CASE("expert cache: wrong options and wrong calls") {
  FakeStore store;
  expect_error([&] { ExpertCache(store, kTopK, with_slots(1)); }, {"cache of 1 experts", "use at least 2"});
  ExpertCacheOptions options = with_slots(4);
  options.policy = "best";
  expect_error([&] { ExpertCache(store, kTopK, options); }, {"\"best\""});
  ExpertCache cache(store, kTopK, with_slots(2));
  CHECK_THROWS_AS(prefill(cache, kManyLayers, {0}), Error);
  CHECK_THROWS_AS(prefill(cache, 0, {1, 0}), Error);
  CHECK_THROWS_AS(prefill(cache, 0, {0, kManyExperts}), Error);
  CHECK_THROWS_AS(decode(cache, 0, {1, 1}, 0), Error);
  CHECK_THROWS_AS(decode(cache, 0, {0, 1, 2}, 0), Error);
  prefill(cache, 0, {});
  CHECK(decode(cache, 0, {0, 1}, 0).size() == 2);
}
