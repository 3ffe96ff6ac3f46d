// What is decided in which order: the calls that policies and memory see, written down.
#include "cache/residency.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "expect_error.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

std::string name_of(ExpertKey key) { return std::to_string(key.layer) + "." + std::to_string(key.expert); }

using Log = std::vector<std::string>;

// First in, first out; refuses one expert if told so.
class LoggingPolicy final : public CachePolicy {
 public:
  LoggingPolicy(Log& log, ExpertKey refused) : log_(log), refused_(refused) {}
  void on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                uint64_t position) override {
    std::string text = "route " + std::to_string(layer) + ":";
    for (const int32_t id : ids) text += " " + std::to_string(id);
    for (const uint16_t score : scores) text += " " + std::to_string(score);
    log_.push_back(text + " @" + std::to_string(position));
  }
  void on_access(ExpertKey key, uint64_t position) override {
    log_.push_back("access " + name_of(key) + " @" + std::to_string(position));
  }
  void on_insert(ExpertKey key, uint64_t position) override {
    log_.push_back("insert " + name_of(key) + " @" + std::to_string(position));
    queue_.push_back(key);
  }
  void on_evict(ExpertKey key) override {
    log_.push_back("remove " + name_of(key));
    queue_.erase(std::find(queue_.begin(), queue_.end(), key));
  }
  bool admits(ExpertKey key) override { return key != refused_; }
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override {
    const auto found = std::find_if_not(queue_.begin(), queue_.end(), pinned);
    log_.push_back("room for " + name_of(incoming) + (found == queue_.end() ? ": none" : ""));
    if (found != queue_.end()) *out = *found;
    return found != queue_.end();
  }
  void resize(int32_t slots) override { log_.push_back("resize " + std::to_string(slots)); }
  void clear() override {
    log_.push_back("clear");
    queue_.clear();
  }

 private:
  Log& log_;
  ExpertKey refused_;
  std::vector<ExpertKey> queue_;
};

// Two layers of six experts, top-2.
class Fixture final : public Residency::Actions {
 public:
  explicit Fixture(int32_t slots, ExpertKey refused = {-1, -1})
      : residency({2, 6, 2, slots}, std::make_unique<LoggingPolicy>(log, refused), *this, true) {}
  void load(ExpertKey key, Phase phase) override {
    log.push_back("load " + name_of(key) + (phase == Phase::kPrefill ? " prefill" : " decode"));
    if (key == failing) throw Error("cannot load");
  }
  void evict(ExpertKey key, Phase phase) override {
    log.push_back("evict " + name_of(key) + (phase == Phase::kPrefill ? " prefill" : " decode"));
  }
  Log taken() { return std::exchange(log, {}); }
  std::vector<bool> decode(int32_t layer, const std::vector<int32_t>& experts, uint64_t position) {
    std::vector<bool> hits;
    residency.decode_group(layer, experts, position, &hits);
    return hits;
  }
  void note(int32_t layer, const std::vector<int32_t>& ids, uint64_t position) {
    residency.note_routing(Phase::kPrefill, layer, ids, {}, position);
  }

  Log log;
  ExpertKey failing{-1, -1};
  Residency residency;
};

}  // namespace

TEST_CASE("residency: a decode group") {
  Fixture fixture(2);
  CHECK(fixture.decode(0, {3, 1}, 7) == std::vector<bool>{false, false});
  CHECK(fixture.taken() ==
        Log{"insert 0.3 @7", "load 0.3 decode", "access 0.3 @7", "insert 0.1 @7", "load 0.1 decode", "access 0.1 @7"});
  // 0.3 is a hit although 0.2, before it, needs room: it is pinned.
  CHECK(fixture.decode(0, {2, 3}, 8) == std::vector<bool>{false, true});
  CHECK(fixture.taken() == Log{"room for 0.2", "remove 0.1", "evict 0.1 decode", "insert 0.2 @8", "load 0.2 decode",
                               "access 0.2 @8", "access 0.3 @8"});
  CHECK(fixture.residency.counts(Phase::kDecode).hits == 1);
  CHECK(fixture.residency.counts(Phase::kDecode).misses == 3);
  const std::vector<AccessEvent> events = fixture.residency.take_events();
  REQUIRE(events.size() == 4);
  CHECK(events[2].key == ExpertKey{0, 2});
  CHECK(!events[2].hit);
  CHECK(events[3].hit);
  CHECK(events[3].position == 8);
  CHECK(fixture.residency.take_events().empty());
}

TEST_CASE("residency: an expert that is not admitted is a miss and nothing else") {
  Fixture fixture(2, {0, 4});
  fixture.decode(0, {4, 1}, 0);
  // A cache that has room takes it.
  CHECK(fixture.residency.resident({0, 4}));
  fixture.decode(0, {2, 3}, 1);
  fixture.taken();
  CHECK(fixture.decode(0, {4, 2}, 2) == std::vector<bool>{false, true});
  CHECK(fixture.taken() == Log{"access 0.2 @2"});
  CHECK(fixture.residency.counts(Phase::kDecode).misses == 5);
}

TEST_CASE("residency: a layer of a prefill chunk") {
  Fixture fixture(2);
  fixture.decode(0, {3, 1}, 0);
  fixture.taken();
  const std::vector<int32_t> experts = {0, 1, 3, 5};
  const std::vector<uint64_t> last_positions = {10, 11, 12, 13};
  {
    Residency::PrefillPass pass(fixture.residency, 0, experts, last_positions);
    REQUIRE(pass.size() == 4);
    // Residents ascending, then the missing ascending.
    for (const size_t n : {0, 1, 2, 3}) CHECK(pass.index(n) == std::vector<size_t>{1, 2, 0, 3}[n]);
    CHECK(pass.issued() == 2);
    pass.issue();
    CHECK(pass.issued() == 2);
    CHECK(fixture.taken() == Log{"room for 0.0: none"});
    pass.complete();
    CHECK(fixture.taken() == Log{"access 0.1 @11", "room for 0.0", "remove 0.1", "evict 0.1 prefill", "insert 0.0 @10",
                                 "load 0.0 prefill", "room for 0.5: none"});
    pass.complete();
    CHECK(fixture.taken() == Log{"access 0.3 @12", "room for 0.5", "remove 0.3", "evict 0.3 prefill", "insert 0.5 @13",
                                 "load 0.5 prefill"});
    pass.complete();
    CHECK(fixture.taken() == Log{"access 0.0 @10"});
    CHECK(pass.done() == 3);
  }
  // The pass ended early: nothing is pinned any more.
  fixture.decode(1, {0, 1}, 14);
  CHECK(fixture.residency.counts(Phase::kPrefill).hits == 2);
  CHECK(fixture.residency.counts(Phase::kPrefill).misses == 2);
  std::vector<int32_t> order;
  for (const AccessEvent& event : fixture.residency.take_events()) {
    if (event.phase == Phase::kPrefill) order.push_back(event.key.expert);
  }
  CHECK(order == std::vector<int32_t>{1, 3, 0, 5});
}

TEST_CASE("residency: hand-over") {
  Fixture fixture(4);
  fixture.decode(1, {4, 5}, 0);
  fixture.decode(0, {2, 3}, 0);
  // Layer 0, tokens 20 to 22: {0, 1}, {1, 2}, {1, 2}. Scores as of token 22, with d = 2^(-1/32): 1 has d^2 + d + 1, 2
  // has d + 1, 0 has d^2. All are chosen. Reads begin with the likeliest of those that are absent, 1 before 0;
  // residents that were not chosen, 0.3 and 1.5, stay if there is room: 1.4 and 1.5 go, being first in.
  fixture.note(0, {0, 1, 1, 2, 1, 2}, 20);
  CHECK(fixture.taken().size() == 12 + 3);
  CHECK(fixture.residency.hand_over() == 2);
  // The policy is told in the order of the last use, then of the expert: 0 was used before 1 and 2.
  CHECK(fixture.taken() == Log{"room for 0.1", "remove 1.4", "evict 1.4 prefill", "insert 0.1 @22", "load 0.1 prefill",
                               "room for 0.0", "remove 1.5", "evict 1.5 prefill", "insert 0.0 @20", "load 0.0 prefill",
                               "access 0.0 @20", "access 0.1 @22", "access 0.2 @22"});
  // They are no accesses of either phase.
  CHECK(fixture.residency.counts(Phase::kPrefill).misses == 0);
  CHECK(fixture.residency.counts(Phase::kDecode).misses == 4);
  // What was noted has been used up.
  CHECK(fixture.residency.hand_over() == 0);
  CHECK(fixture.taken().empty());
  // More than fits: the slots' number of the best. Decode's routing is not noted.
  fixture.residency.note_routing(Phase::kDecode, 1, std::vector<int32_t>{0, 1}, {}, 23);
  fixture.note(1, {0, 1, 2, 3, 4, 5}, 30);
  CHECK(fixture.residency.hand_over() == 4);
  for (const int32_t expert : {2, 3, 4, 5}) CHECK(fixture.residency.resident({1, expert}));
}

TEST_CASE("residency: routing reaches the policy token by token") {
  Fixture fixture(2);
  const std::vector<uint16_t> scores = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  fixture.residency.note_routing(Phase::kPrefill, 1, std::vector<int32_t>{0, 5, 3, 1}, scores, 8);
  fixture.residency.note_routing(Phase::kDecode, 0, std::vector<int32_t>{2, 4}, {}, 10);
  CHECK(fixture.taken() == Log{"route 1: 0 5 1 2 3 4 5 6 @8", "route 1: 3 1 7 8 9 10 11 12 @9", "route 0: 2 4 @10"});
}

TEST_CASE("residency: a load that fails, drop, clear and resize") {
  Fixture fixture(3);
  fixture.failing = {0, 1};
  expect_error([&] { fixture.decode(0, {1, 2}, 0); }, {"cannot load"});
  // It stays until its owner drops it; and its group is not pinned any more.
  CHECK(fixture.residency.resident({0, 1}));
  CHECK(fixture.residency.resident_count() == 1);
  fixture.residency.drop({0, 1});
  CHECK(!fixture.residency.resident({0, 1}));
  fixture.failing = {-1, -1};
  fixture.decode(0, {1, 2}, 1);
  fixture.decode(1, {0, 1}, 2);
  fixture.taken();
  fixture.residency.resize(2);
  CHECK(fixture.taken() == Log{"room for 0.0", "remove 0.2", "evict 0.2 prefill", "resize 2"});
  CHECK(fixture.residency.facts().slots == 2);
  fixture.note(0, {0, 1}, 3);
  fixture.taken();
  fixture.residency.clear();
  // Nobody is evicted, and the prompt is forgotten.
  CHECK(fixture.taken() == Log{"clear"});
  CHECK(fixture.residency.resident_count() == 0);
  CHECK(fixture.residency.hand_over() == 0);
  // Counts are for their owner to forget.
  CHECK(fixture.residency.counts(Phase::kDecode).misses == 5);
  fixture.residency.reset_counts();
  CHECK(fixture.residency.counts(Phase::kDecode).misses == 0);
}

TEST_CASE("residency: calls that contradict") {
  Fixture fixture(2);
  Residency& residency = fixture.residency;
  const std::vector<uint64_t> positions = {0, 0};
  const auto note = [&](int32_t layer, const std::vector<int32_t>& ids, const std::vector<uint16_t>& scores = {}) {
    residency.note_routing(Phase::kPrefill, layer, ids, scores, 0);
  };
  const auto pass = [&](int32_t layer, const std::vector<int32_t>& experts) {
    Residency::PrefillPass(residency, layer, experts, positions);
  };
  expect_error([&] { note(2, {0, 1}); }, {"no MoE layer 2"});
  expect_error([&] { note(-1, {0, 1}); }, {"no MoE layer -1"});
  expect_error([&] { note(0, {0, 6}); }, {"no expert 6"});
  expect_error([&] { note(0, {0, 1, 2}); }, {"3 ids and 0 scores"});
  expect_error([&] { note(0, {0, 1}, {1, 2, 3, 4, 5}); }, {"2 ids and 5 scores"});
  expect_error([&] { fixture.decode(0, {0, 1, 2}, 0); }, {"a group of 3 experts does not fit"});
  expect_error([&] { fixture.decode(0, {1, 1}, 0); }, {"expert 1 twice in a group"});
  expect_error([&] { fixture.decode(0, {-1, 1}, 0); }, {"no expert -1"});
  expect_error([&] { pass(0, {1, 0}); }, {"not ascending"});
  expect_error([&] { pass(0, {1, 1}); }, {"not ascending"});
  expect_error([&] { pass(0, {1}); }, {"lack positions"});
  CHECK(fixture.taken().empty());
  CHECK(residency.resident_count() == 0);
  // The pins of what failed are gone.
  CHECK(fixture.decode(0, {1, 0}, 0).size() == 2);
}
