// The thread pool: every task once, on its own thread, with failures handed back.
#include "engine/thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace cfmoe {

TEST_CASE("every task runs once, the tasks of a share on one thread") {
  for (int32_t threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    for (int32_t tasks : {0, 1, 2, 7, 64}) {
      std::vector<int> runs(static_cast<size_t>(tasks));
      std::vector<std::thread::id> ids(static_cast<size_t>(tasks));
      auto task = [&](int32_t i) {
        ++runs[i];
        ids[i] = std::this_thread::get_id();
        return 0;
      };
      CHECK(pool.run(tasks, task) == 0);
      for (int32_t i = 0; i < tasks; ++i) {
        CHECK(runs[i] == 1);
        if (tasks > 1) CHECK(ids[i] == ids[i % threads]);
      }
    }
  }
}

TEST_CASE("many rounds, with and without sleep between them") {
  ThreadPool pool(4);
  int64_t sums[4] = {0, 0, 0, 0};
  auto task = [&](int32_t i) {
    sums[i] += i + 1;
    return 0;
  };
  for (int round = 0; round < 2000; ++round) {
    pool.run(4, task);
    if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (int i = 0; i < 4; ++i) CHECK(sums[i] == 2000 * (i + 1));
}

TEST_CASE("a non-zero result comes back, that of the lowest thread") {
  ThreadPool pool(3);
  auto task = [](int32_t i) { return i == 0 ? 0 : 10 + i; };
  CHECK(pool.run(3, task) == 11);
  auto fine = [](int32_t) { return 0; };
  CHECK(pool.run(3, fine) == 0);
}

TEST_CASE("an exception comes back and the pool stays usable") {
  ThreadPool pool(3);
  for (int32_t thrower : {0, 1, 2}) {
    auto task = [&](int32_t i) -> int {
      if (i == thrower) throw std::runtime_error("task " + std::to_string(i));
      return 0;
    };
    CHECK_THROWS_WITH_AS(pool.run(3, task), ("task " + std::to_string(thrower)).c_str(), std::runtime_error);
  }
  std::atomic<int> count{0};
  auto task = [&](int32_t) { return count++, 0; };
  pool.run(9, task);
  CHECK(count == 9);
}

TEST_CASE("a nested run is inline") {
  ThreadPool pool(3);
  std::atomic<int> count{0};
  auto outer = [&](int32_t) {
    const auto self = std::this_thread::get_id();
    auto inner = [&](int32_t) {
      ++count;
      return std::this_thread::get_id() == self ? 0 : 1;
    };
    return pool.run(5, inner);
  };
  CHECK(pool.run(3, outer) == 0);
  CHECK(count == 15);
}

TEST_CASE("two callers at once both get all of their tasks") {
  ThreadPool pool(2);
  const auto call = [&pool](int64_t* sum) {
    for (int round = 0; round < 300; ++round) {
      std::atomic<int64_t> part{0};
      auto task = [&](int32_t i) { return part += i, 0; };
      pool.run(8, task);
      *sum += part;
    }
  };
  int64_t a = 0, b = 0;
  std::thread other(call, &a);
  call(&b);
  other.join();
  CHECK(a == 300 * 28);
  CHECK(b == 300 * 28);
}

TEST_CASE("the machine has at least one core") { CHECK(physical_cores() >= 1); }

}  // namespace cfmoe
