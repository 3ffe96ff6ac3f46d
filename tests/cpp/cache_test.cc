// The cache's parts: pool, hand-over, I/O queue.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <future>
#include <numeric>
#include <thread>

#include "cache/expert_pool.h"
#include "cache/hand_over.h"
#include "cache/io_queue.h"
#include "expect_error.h"

using namespace cfmoe;
using namespace cfmoe::test;

TEST_CASE("pool: slots, slabs, growing and shrinking") {
  // 5 slots of 16 KiB with slabs of at most 2 slots: 2 + 2 + 1.
  ExpertPool pool(16384, 5, 40000);
  CHECK(pool.slabs() == 3);
  CHECK(pool.bytes() == 5 * 16384);
  for (int32_t slot = 0; slot < 5; ++slot) CHECK(pool.acquire() == slot);
  CHECK(pool.acquire() == -1);
  CHECK(pool.view(0).base == pool.view(1).base);
  CHECK(pool.view(1).word_offset == 4096);
  CHECK(pool.view(1).extent_words == 8192);
  CHECK(pool.view(4).word_offset == 0);
  CHECK(pool.view(4).extent_words == 4096);
  CHECK(reinterpret_cast<uintptr_t>(pool.view(4).base) % 16384 == 0);
  auto bytes_of = [&](int32_t slot) {
    return static_cast<char*>(pool.view(slot).base) + pool.view(slot).word_offset * 4;
  };
  for (int32_t slot = 0; slot < 5; ++slot) std::memset(bytes_of(slot), slot + 1, 16384);

  CHECK_THROWS_AS(pool.resize(4), Error);
  pool.release(0);
  pool.release(4);
  CHECK_THROWS_AS(pool.release(4), Error);
  pool.resize(3);  // slot 4's slab goes, slot 0 next
  CHECK(pool.slabs() == 2);
  CHECK(pool.capacity() == 3);
  CHECK(pool.acquire() == -1);
  CHECK(bytes_of(1)[0] == 2);
  CHECK(bytes_of(3)[16383] == 4);
  pool.resize(6);
  CHECK(pool.acquire() == 0);
  CHECK(bytes_of(0)[0] == 0);
  CHECK(pool.acquire() == 4);
  CHECK(pool.acquire() == 5);
  CHECK(pool.acquire() == -1);
  expect_error([] { ExpertPool(32768, 1, 16384); }, {"32768", "16384"});
  CHECK_THROWS_AS(ExpertPool(1000, 1), Error);
}

TEST_CASE("pool: word offsets stay below 2^31 in fp16 units") {
  // Never touched, so it costs addresses only: 65 slots of 64 MiB are 4.06 GiB, one slot more than a slab holds.
  ExpertPool pool(uint64_t{64} << 20, 65);
  CHECK(pool.slabs() == 2);
  CHECK(pool.view(63).word_offset == 63 << 24);
  CHECK(pool.view(63).extent_words * 2 == int64_t{1} << 31);
  CHECK(pool.view(64).word_offset == 0);
}

TEST_CASE("hand-over: scores decay by half in a half-life") {
  PrefillRouting routing(2, 4);
  CHECK(routing.empty());
  // top-1, 33 tokens: expert 0 for the first, expert 1 for the last, expert 2 between.
  std::vector<int32_t> ids(33, 2);
  ids[0] = 0;
  ids[32] = 1;
  routing.note(0, ids, 1, 0);
  std::vector<PrefillRouting::Use> uses = routing.uses();
  REQUIRE(uses.size() == 3);
  CHECK(uses[0].score == doctest::Approx(0.5));
  CHECK(uses[1].score == doctest::Approx(1.0));
  double between = 0;
  for (int distance = 1; distance < 32; ++distance) between += std::exp2(-distance / 32.0);
  CHECK(uses[2].score == doctest::Approx(between));
  CHECK(uses[2].last_position == 31);
  routing.clear();
  CHECK(routing.uses().empty());
}

TEST_CASE("hand-over: the best by score, told least recent first, ties by layer and expert") {
  PrefillRouting routing(2, 4);
  // Tokens 10 and 11, top-2. Layer 0: {0, 1}, {1, 2}; layer 1: {3, 2}, {2, 3}.
  routing.note(0, std::vector<int32_t>{0, 1, 1, 2}, 2, 10);
  routing.note(1, std::vector<int32_t>{3, 2, 2, 3}, 2, 10);
  auto keys = [&](int32_t slots) {
    std::vector<std::pair<int32_t, int32_t>> out;
    for (const PrefillRouting::Use& use : choose_hand_over(routing, slots))
      out.emplace_back(use.key.layer, use.key.expert);
    return out;
  };
  // Scores: (0,1), (1,2), (1,3) have d + 1, where d = 2^(-1/32); (0,2) has 1; (0,0) has d.
  CHECK(keys(2) == std::vector<std::pair<int32_t, int32_t>>{{0, 1}, {1, 2}});
  CHECK(keys(4) == std::vector<std::pair<int32_t, int32_t>>{{0, 1}, {0, 2}, {1, 2}, {1, 3}});
  // (0,0) was used last at token 10, all others at 11.
  CHECK(keys(8) == std::vector<std::pair<int32_t, int32_t>>{{0, 0}, {0, 1}, {0, 2}, {1, 2}, {1, 3}});
  CHECK(keys(0).empty());
  CHECK_THROWS_AS(routing.note(2, std::vector<int32_t>{0, 1}, 2, 12), Error);
  CHECK_THROWS_AS(routing.note(0, std::vector<int32_t>{0, 1, 2}, 2, 12), Error);
  CHECK_THROWS_AS(routing.note(0, std::vector<int32_t>{0, 4}, 2, 12), Error);
  CHECK_THROWS_AS(routing.note(0, std::vector<int32_t>{0, 1}, 2, 5), Error);
}

TEST_CASE("hand-over: one call or several give the same choice") {
  std::vector<int32_t> ids(200);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i % 7 % 4);
  PrefillRouting whole(1, 4), parts(1, 4);
  whole.note(0, ids, 1, 0);
  for (size_t i = 0; i < ids.size(); i += 50) parts.note(0, std::span(ids).subspan(i, 50), 1, i);
  for (size_t i = 0; i < whole.uses().size(); ++i) CHECK(whole.uses()[i].score == parts.uses()[i].score);
}

TEST_CASE("i/o queue: results, errors and order") {
  IoQueue queue(2);
  std::vector<int> values(50);
  std::vector<IoQueue::JobPtr> jobs;
  for (size_t i = 0; i < values.size(); ++i) {
    jobs.push_back(queue.submit([&values, i] {
      if (i == 20) throw Error("twenty");
      values[i] = static_cast<int>(i);
    }));
  }
  queue.wait_any(jobs);
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (i == 20) {
      expect_error([&] { queue.wait(jobs[i]); }, {"twenty"});
      expect_error([&] { queue.wait(jobs[i]); }, {"twenty"});
    } else {
      queue.wait(jobs[i]);
    }
    CHECK(queue.done(jobs[i]));
  }
  CHECK(std::accumulate(values.begin(), values.end(), 0) == 49 * 50 / 2 - 20);
}

TEST_CASE("i/o queue: idle, and an end with work left") {
  std::atomic<int> begun = 0;
  {
    IoQueue queue(1);
    for (int i = 0; i < 3; ++i) queue.submit([&] { ++begun; });
    queue.wait_idle();
    CHECK(begun == 3);
    for (int i = 0; i < 100; ++i) {
      queue.submit([&] {
        ++begun;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      });
    }
  }
  CHECK(begun < 103);
}

TEST_CASE("i/o queue: reads ahead wait for all others, and may be demanded or withdrawn") {
  IoQueue queue(2);
  std::promise<void> end;
  std::shared_future<void> ended = end.get_future().share();
  std::vector<int> order;
  const IoQueue::JobPtr first = queue.submit([ended] { ended.wait(); });
  std::vector<IoQueue::JobPtr> ahead;
  for (int i = 0; i < 4; ++i) ahead.push_back(queue.submit_ahead([&order, i] { order.push_back(i); }));
  for (const IoQueue::JobPtr& job : ahead) CHECK(queue.waits(job));
  CHECK(queue.withdraw(ahead[1]));
  CHECK_FALSE(queue.withdraw(ahead[1]));
  CHECK_FALSE(queue.withdraw(first));
  queue.demand(ahead[2]);
  queue.wait(ahead[2]);
  CHECK_FALSE(queue.waits(ahead[2]));
  CHECK_FALSE(queue.withdraw(ahead[2]));
  CHECK(queue.waits(ahead[0]));
  end.set_value();
  queue.wait_idle();
  CHECK(order == std::vector<int>{2, 0, 3});
  queue.demand(ahead[3]);
  CHECK(queue.done(ahead[3]));
}

TEST_CASE("i/o queue: reads ahead that are held back begin only where they are demanded") {
  IoQueue queue(2);
  queue.hold_ahead(true);
  std::vector<int> order;
  std::vector<IoQueue::JobPtr> ahead;
  for (int i = 0; i < 3; ++i) ahead.push_back(queue.submit_ahead([&order, i] { order.push_back(i); }));
  queue.demand(ahead[1]);
  queue.wait_idle();
  CHECK(order == std::vector<int>{1});
  CHECK(queue.waits(ahead[0]));
  queue.hold_ahead(false);
  queue.wait_idle();
  CHECK(order == std::vector<int>{1, 0, 2});
}
