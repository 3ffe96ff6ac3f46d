// Warm starts: what is read ahead and when, that demanded reads go first, and that nothing depends on how far it came.
#include <doctest/doctest.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "cache/expert_cache.h"
#include "expect_error.h"
#include "fake_store.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

constexpr int32_t kAll = kManyLayers * kManyExperts;

ExpertCacheOptions with_slots(int32_t slots, const char* policy = "lru") {
  ExpertCacheOptions options;
  options.slots = slots;
  options.policy = policy;
  options.log_events = true;
  return options;
}

std::vector<ExpertKey> all_experts() {
  std::vector<ExpertKey> keys;
  for (int32_t id = 0; id < kAll; ++id) keys.push_back({id / kManyExperts, id % kManyExperts});
  return keys;
}

ExpertCache::ComputeFn checking(int32_t layer, std::span<const int32_t> experts) {
  return [layer, experts](std::span<const ReadyExpert> batch) {
    for (const ReadyExpert& ready : batch) {
      const auto* bytes = static_cast<const char*>(ready.view.base) + int64_t{ready.view.word_offset} * 4;
      const ExpertKey key{layer, experts[static_cast<size_t>(ready.index)]};
      CHECK(bytes[0] == FakeStore::id_of(key));
      CHECK(bytes[kBytes - 1] == FakeStore::id_of(key));
    }
  };
}

void decode(ExpertCache& cache, int32_t layer, std::vector<int32_t> experts, uint64_t position) {
  cache.note_routing(Phase::kDecode, layer, experts, {}, position);
  cache.decode_group(layer, experts, position, checking(layer, experts));
}

void prefill(ExpertCache& cache, int32_t layer, std::vector<int32_t> experts, uint64_t position) {
  cache.note_routing(Phase::kPrefill, layer, experts, {}, position);
  std::vector<uint64_t> positions(experts.size(), position);
  cache.prefill_layer(layer, experts, positions, checking(layer, experts));
}

int shown(const ExpertCache& cache) {
  std::vector<uint8_t> residents(kAll);
  cache.residents(residents);
  return static_cast<int>(std::count(residents.begin(), residents.end(), 1));
}

// A store whose reads wait until they are let go, by id or all.
class GatedStore final : public ExpertStore {
 public:
  explicit GatedStore(FakeStore& store) : store_(store) {}
  IoMode mode() const override { return store_.mode(); }
  const ExpertIndex& index() const override { return store_.index(); }
  std::string warning() const override { return ""; }
  uint64_t read(ExpertKey key, void* destination) override {
    std::unique_lock lock(mutex_);
    begun_.push_back(FakeStore::id_of(key));
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_ || allowed_.count(FakeStore::id_of(key)) != 0; });
    lock.unlock();
    return store_.read(key, destination);
  }
  void* map(ExpertKey) override { return nullptr; }
  void unmap(ExpertKey) override {}

  void allow(const std::set<int>& ids) {
    const std::lock_guard lock(mutex_);
    allowed_ = ids;
    changed_.notify_all();
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  std::vector<int> begun(size_t at_least) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return begun_.size() >= at_least; });
    return begun_;
  }

 private:
  FakeStore& store_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::set<int> allowed_;
  bool open_ = false;
  std::vector<int> begun_;
};

}  // namespace

TEST_CASE("warm cache: free slots are filled with the likeliest, each read once, and found as hits") {
  for (const IoMode mode : {IoMode::kDirect, IoMode::kMmap}) {
    FakeStore store(mode);
    ExpertCache cache(store, kTopK, with_slots(10));
    std::vector<ExpertKey> order = all_experts();
    std::reverse(order.begin(), order.end());
    cache.keep_warm(order);
    cache.drain();
    CHECK(store.total_reads() == 10);
    CHECK(shown(cache) == 10);
    CHECK(cache.residents(2) == std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(cache.residents(1) == std::vector<int32_t>{6, 7});
    PhaseMetrics metrics = cache.metrics(Phase::kPrefill);
    CHECK(metrics.prefetched == 10);
    CHECK(metrics.hits + metrics.misses == 0);
    CHECK(metrics.bytes_read == 10 * (mode == IoMode::kMmap ? kBytes : kBytes + 7));
    decode(cache, 2, {0, 7}, 0);
    CHECK(cache.metrics(Phase::kDecode).hits == 2);
    CHECK(store.total_reads() == 10);
    // The first of the list counts as used last: the victim is the last that found room, expert 6 of layer 1.
    decode(cache, 0, {3, 4}, 1);
    CHECK(cache.residents(1).empty());
    CHECK(store.total_reads() == 12);
  }
}

TEST_CASE("warm cache: one read ahead at a time, in order, and none while others are under way") {
  FakeStore fake;
  GatedStore store(fake);
  ExpertCache cache(store, kTopK, with_slots(kAll));
  cache.keep_warm(all_experts());
  CHECK(store.begun(1) == std::vector<int>{0});
  CHECK(shown(cache) == 1);
  // Both experts of this group, demanded from the end of the list, come before the next in order where they are known
  // of.
  std::thread reader([&] { decode(cache, 2, {5, 3}, 0); });
  CHECK(store.begun(2) == std::vector<int>{0, 21});
  store.allow({0, 21, 19});
  reader.join();
  const std::vector<int> begun = store.begun(3);
  CHECK(std::find(begun.begin(), begun.begin() + std::min<ptrdiff_t>(4, std::ssize(begun)), 19) != begun.end());
  CHECK(std::count(begun.begin(), begun.end(), 2) == 0);
  store.open();
  cache.drain();
  CHECK(fake.total_reads() == kAll);
  CHECK(cache.metrics(Phase::kDecode).hits == 2);
  CHECK(cache.metrics(Phase::kDecode).bytes_read == 2 * (kBytes + 7));
  CHECK(cache.metrics(Phase::kPrefill).prefetched == kAll - 2);
}

TEST_CASE("warm cache: hits, misses and victims do not depend on how far reading ahead has come") {
  for (const char* policy : {"lru", "lfu", "lfu-layer", "lrfu", "s3fifo"}) {
    INFO(policy);
    std::vector<std::vector<uint8_t>> histories;
    for (const int sleep_us : {0, 300}) {
      FakeStore store;
      store.max_sleep_us = sleep_us;
      ExpertCache cache(store, kTopK, with_slots(9, policy));
      cache.keep_warm(all_experts());
      if (sleep_us == 0) cache.drain();
      std::vector<uint8_t> history;
      for (int conversation = 0; conversation < 2; ++conversation) {
        cache.begin_conversation();
        for (int32_t layer = 0; layer < kManyLayers; ++layer) prefill(cache, layer, {1, 2, 5, 6}, 0);
        cache.hand_over();
        for (uint64_t position = 2; position < 12; ++position) {
          for (int32_t layer = 0; layer < kManyLayers; ++layer) {
            const auto expert = static_cast<int32_t>((position * 3 + static_cast<uint64_t>(layer)) % kManyExperts);
            decode(cache, layer, {expert, (expert + 1) % kManyExperts}, position);
            if (position == 6) cache.resize(conversation == 0 ? 5 : 11);
            for (const int32_t one : cache.residents(layer)) history.push_back(static_cast<uint8_t>(one));
          }
        }
        for (const AccessEvent& event : cache.take_events()) {
          history.push_back(event.hit ? 1 : 0);
          CHECK(event.position < 12);
        }
      }
      histories.push_back(history);
    }
    CHECK(histories[0] == histories[1]);
  }
}

TEST_CASE("warm cache: a conversation finds what the one before left, a cold one nothing") {
  for (const bool warm : {false, true}) {
    FakeStore store;
    ExpertCache cache(store, kTopK, with_slots(6));
    if (warm) cache.keep_warm({});
    cache.begin_conversation();
    decode(cache, 1, {2, 3}, 0);
    cache.drain();
    cache.begin_conversation();
    cache.reset_metrics();
    CHECK(cache.residents(1).size() == (warm ? 2 : 0));
    decode(cache, 1, {2, 3}, 0);
    CHECK(cache.metrics(Phase::kDecode).hits == (warm ? 2 : 0));
    CHECK(store.total_reads() == (warm ? 2 : 4));
  }
}

TEST_CASE("warm cache: shrinking keeps the likeliest, growing fills again, another list replaces the first") {
  FakeStore store;
  store.max_sleep_us = 500;
  ExpertCache cache(store, kTopK, with_slots(12));
  cache.keep_warm(all_experts());
  cache.resize(4);
  CHECK(cache.pool_bytes() == 4 * kBytes);
  CHECK(cache.residents(0) == std::vector<int32_t>{0, 1, 2, 3});
  CHECK(cache.residents(1).empty());
  cache.resize(6);
  CHECK(cache.residents(0) == std::vector<int32_t>{0, 1, 2, 3, 4, 5});
  // What is not read yet of a list that ends is forgotten.
  cache.keep_warm({});
  cache.drain();
  CHECK(shown(cache) == static_cast<int>(cache.residents(0).size()));
  const int before = store.total_reads();
  cache.resize(9);
  cache.drain();
  CHECK(store.total_reads() == before);
  cache.keep_warm({{2, 7}, {2, 6}, {2, 7}});
  cache.drain();
  CHECK(cache.residents(2) == std::vector<int32_t>{6, 7});
  CHECK(store.total_reads() == before + 2);
  decode(cache, 2, {7, 6}, 0);
  CHECK(cache.metrics(Phase::kDecode).misses == 0);
}

TEST_CASE("warm cache: a record that cannot be read ahead is told of when it is wanted") {
  FakeStore store;
  store.failing = FakeStore::id_of({0, 3});
  ExpertCache cache(store, kTopK, with_slots(kAll));
  cache.keep_warm(all_experts());
  cache.begin_conversation();
  expect_error([&] { decode(cache, 0, {3, 1}, 0); }, {"expert 3", "damaged"});
  store.failing = -1;
  decode(cache, 0, {3, 1}, 0);
  cache.drain();
  CHECK(shown(cache) == kAll);
}

TEST_CASE("warm cache: it may be closed while it reads ahead") {
  FakeStore store;
  store.max_sleep_us = 2000;
  ExpertCache cache(store, kTopK, with_slots(kAll));
  cache.keep_warm(all_experts());
}
