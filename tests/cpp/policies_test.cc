// The cache policies: traces worked out by hand, pinning, clearing and resizing.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cache/cache_policy.h"
#include "cache/predictive_policies.h"
#include "expect_error.h"
#include "simulate/oracle_policies.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

const CachePolicy::Pinned kNonePinned = [](ExpertKey) { return false; };
const CachePolicy::Pinned kAllPinned = [](ExpertKey) { return true; };

// One layer of eight experts, top-1.
PolicyFacts one_layer(int32_t slots) { return {1, 8, 1, slots}; }

// What the router says of a layer's first experts, as probabilities; the others have none.
using Scores = std::vector<double>;

struct Access {
  ExpertKey key;
  uint64_t position;
  Scores scores = {};
};

std::vector<Access> in_layer_0(const std::vector<int32_t>& experts, const std::vector<Scores>& scores = {}) {
  std::vector<Access> accesses;
  for (size_t i = 0; i < experts.size(); ++i)
    accesses.push_back({{0, experts[i]}, i, scores.empty() ? Scores{} : scores[i]});
  return accesses;
}

// Drives a policy as a cache with top-1 routing does.
class Driven {
 public:
  Driven(const PolicyFacts& facts, std::unique_ptr<CachePolicy> policy, Clock* clock = nullptr)
      : facts_(facts), policy_(std::move(policy)), clock_(clock) {}

  // Per access: 'H' for a hit, '-' for a free slot, 'x' for an expert that was not admitted, else the victim: its
  // expert, behind its layer and a point where there are several layers.
  std::string run(const std::vector<Access>& accesses) {
    std::string out;
    for (const Access& access : accesses) out += step(access);
    return out;
  }
  void clear() {
    policy_->clear();
    residents_.clear();
  }
  CachePolicy& policy() { return *policy_; }
  // -1: none.
  ExpertKey victim(ExpertKey incoming, const CachePolicy::Pinned& pinned = kNonePinned) {
    ExpertKey key;
    return policy_->victim(incoming, pinned, &key) ? key : ExpertKey{-1, -1};
  }
  const std::vector<ExpertKey>& residents() const { return residents_; }

 private:
  std::string step(const Access& access) {
    if (clock_ != nullptr) ++clock_->now;
    std::vector<uint16_t> scores(static_cast<size_t>(facts_.experts));
    std::transform(access.scores.begin(), access.scores.end(), scores.begin(),
                   [](double p) { return static_cast<uint16_t>(std::lround(65535 * p)); });
    policy_->on_route(access.key.layer, std::vector<int32_t>{access.key.expert}, scores, access.position);
    std::string what = "H";
    if (std::find(residents_.begin(), residents_.end(), access.key) == residents_.end()) {
      what = "-";
      if (static_cast<int32_t>(residents_.size()) == facts_.slots) {
        if (!policy_->admits(access.key)) return "x";
        const ExpertKey out = victim(access.key);
        const auto place = std::find(residents_.begin(), residents_.end(), out);
        REQUIRE(place != residents_.end());
        residents_.erase(place);
        policy_->on_evict(out);
        what = (facts_.layers > 1 ? std::to_string(out.layer) + "." : "") + std::to_string(out.expert);
      }
      policy_->on_insert(access.key, access.position);
      residents_.push_back(access.key);
    }
    policy_->on_access(access.key, access.position);
    return what;
  }

  PolicyFacts facts_;
  std::unique_ptr<CachePolicy> policy_;
  Clock* clock_;
  std::vector<ExpertKey> residents_;
};

std::string run(const std::string& policy, const PolicyFacts& facts, const std::vector<Access>& accesses) {
  return Driven(facts, make_policy(policy, facts)).run(accesses);
}

std::vector<Access> random_accesses(const PolicyFacts& facts, size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Access> accesses;
  for (size_t i = 0; i < count; ++i) {
    Access access{{static_cast<int32_t>(i) % facts.layers, 0}, i / static_cast<size_t>(facts.layers)};
    // Some are more popular than others.
    access.key.expert = static_cast<int32_t>(
        std::min(random() % static_cast<uint64_t>(facts.experts), random() % static_cast<uint64_t>(facts.experts)));
    for (int32_t e = 0; e < facts.experts; ++e) access.scores.push_back(static_cast<double>(random() % 1000) / 1000);
    accesses.push_back(std::move(access));
  }
  return accesses;
}

std::unique_ptr<CachePolicy> make_oracle(const std::string& name, const PolicyFacts& facts, const Future& future,
                                         const Clock& clock, uint32_t lookahead) {
  if (name == "lopt") return std::make_unique<LoptPolicy>(facts, future, clock, lookahead);
  return std::make_unique<OptPolicy>(facts, future, clock, name == "opt-bypass");
}

// An oracle that knows the accesses before they come.
std::string run_oracle(const std::string& name, int32_t slots, const std::vector<int32_t>& experts,
                       uint32_t lookahead = 0, uint32_t horizon = Future::kNever) {
  const PolicyFacts facts = one_layer(slots);
  const Future future({experts.begin(), experts.end()}, facts.total());
  Clock clock{-1, std::min(horizon, future.length())};
  return Driven(facts, make_oracle(name, facts, future, clock, lookahead), &clock).run(in_layer_0(experts));
}

}  // namespace

TEST_CASE("lru: five-access traces") {
  // 2 slots. 0: free; 1: free; 0: hit, so 1 is the oldest; 2: evicts 1; 1: evicts 0, the oldest of {0, 2}.
  CHECK(run("lru", one_layer(2), in_layer_0({0, 1, 0, 2, 1})) == "--H10");
  // 3 slots, a loop of four: always the next one needed is the victim. 3 evicts 0, 0 evicts 1.
  CHECK(run("lru", one_layer(3), in_layer_0({0, 1, 2, 3, 0})) == "---01");
  // 1 slot: everything that differs from the last access misses. 4: free; 4: hit; 5 evicts 4; 4 evicts 5; 4: hit.
  CHECK(run("lru", one_layer(1), in_layer_0({4, 4, 5, 4, 4})) == "-H45H");
}

TEST_CASE("lfu: five-access traces") {
  // 2 slots. 0 has two uses, 1 has one: 2 evicts 1. Of 0 with two and 2 with one, 1 evicts 2; LRU would evict 0.
  CHECK(run("lfu", one_layer(2), in_layer_0({0, 0, 1, 2, 1})) == "-H-12");
  // One use each: the least recent goes. 2 evicts 0, 0 evicts 1, 2 is there.
  CHECK(run("lfu", one_layer(2), in_layer_0({0, 1, 2, 0, 2})) == "--01H");
}

TEST_CASE("lfu, lfu-history: what an evicted expert's uses are worth") {
  // 2 slots. 1 has two uses, so 2 evicts 0, and 0, coming back, evicts 2. Then 3 meets 1 with two uses, the last of
  // them older than 0's: with history 0 has two as well and 1 goes, without it 0 has one and goes.
  const std::vector<Access> trace = in_layer_0({0, 1, 1, 2, 0, 3});
  CHECK(run("lfu", one_layer(2), trace) == "--H020");
  CHECK(run("lfu-history", one_layer(2), trace) == "--H021");
  // Five accesses: as lfu, because nothing comes back before its uses matter.
  CHECK(run("lfu-history", one_layer(2), in_layer_0({0, 0, 1, 2, 1})) == "-H-12");
}

TEST_CASE("lfu-layer: five-access traces") {
  // 2 layers, 2 slots: one each. 0.0 and 0.1 fill the cache. 1.0 is the first of its layer, so the layer above its
  // share gives up its least recent of one use each, 0.0. Then layer 0 has its share: 0.0 evicts 0.1. 1.0 is a hit.
  const PolicyFacts two{2, 4, 1, 2};
  CHECK(run("lfu-layer", two, {{{0, 0}, 0}, {{0, 1}, 1}, {{1, 0}, 1}, {{0, 0}, 2}, {{1, 0}, 2}}) == "--0.00.1H");
  // 3 slots: two for layer 0, one for layer 1. 1.1 has its share taken by 1.0, which it evicts although 0.1 is older.
  // 0.2 is in the same position: of 0.0 with two uses and 0.1 with one it evicts the latter.
  const PolicyFacts three{2, 4, 1, 3};
  Driven driven(three, make_policy("lfu-layer", three));
  CHECK(driven.run({{{0, 1}, 0}, {{0, 0}, 1}, {{1, 0}, 1}, {{1, 1}, 2}, {{0, 0}, 2}}) == "---1.0H");
  CHECK(driven.run({{{0, 2}, 3}}) == "0.1");
}

TEST_CASE("lrfu: five-access traces") {
  // 2 slots. At token 3 expert 0 has 2^(-3/32) + 2^(-1/32) = 1.92, expert 1 2^(-2/32) = 0.96: 2 evicts 1. At token 4
  // expert 0 has 1.88, expert 2 0.98: 1 evicts 2, where LRU would evict 0.
  CHECK(run("lrfu", one_layer(2), in_layer_0({0, 1, 0, 2, 1})) == "--H12");
  // At token 101 expert 0 has 2^(-101/32) + 2^(-100/32) = 0.23, expert 1 2^(-1/32) = 0.98: 2 evicts 0, where LFU would
  // evict 1.
  CHECK(run("lrfu", one_layer(2), {{{0, 0}, 0}, {{0, 0}, 1}, {{0, 1}, 100}, {{0, 2}, 101}, {{0, 1}, 102}}) == "-H-0H");
  // 1 slot: the one resident goes whatever its score.
  CHECK(run("lrfu", one_layer(1), in_layer_0({0, 0, 1, 2, 0})) == "-H012");
}

TEST_CASE("lrfu: uses outlive eviction") {
  // 2 slots. 0 has one use, 1 two: 2 evicts 0, which comes back and evicts 2. At token 5 expert 0 has
  // 2^(-5/32) + 2^(-1/32) = 1.876, expert 1 2^(-4/32) + 2^(-3/32) = 1.854: 3 evicts 1. Had 0 begun anew, it would have
  // 0.98 and go.
  CHECK(run("lrfu", one_layer(2), in_layer_0({0, 1, 1, 2, 0, 3})) == "--H021");
}

TEST_CASE("s3fifo: five-access traces") {
  // 2 slots; one of them is the small queue's share. 2 evicts 0, the oldest of small [0, 1]. 0 is remembered: it evicts
  // 1, the oldest of small [1, 2], and goes to main. Now small [2] is within its share, so 3 evicts 0, the oldest of
  // main.
  CHECK(run("s3fifo", one_layer(2), in_layer_0({0, 1, 2, 0, 3})) == "--010");
  // 3 slots. 0 was used since it came, so 3 moves it on to main and evicts 1, the next of small [0, 1, 2].
  CHECK(run("s3fifo", one_layer(3), in_layer_0({0, 0, 1, 2, 3})) == "-H--1");
  // 3 slots. 3 evicts 0; 0 is remembered and evicts 1; small [2, 3], main [0].
  CHECK(run("s3fifo", one_layer(3), in_layer_0({0, 1, 2, 3, 0})) == "---01");
}

TEST_CASE("s3fifo: uses in main are reprieves") {
  // 2 slots. As above 0 is in main and 2 in small after four accesses; then 0 is used once more. 3 finds small within
  // its share, takes the use from 0 and, coming round, evicts it: main has no other.
  CHECK(run("s3fifo", one_layer(2), in_layer_0({0, 1, 2, 0, 0, 3})) == "--01H0");
  // 3 slots: small [2, 3], main [0] after five accesses. 1 is remembered too: it evicts 2 and main is [0, 1]. 0 is
  // used. 4 finds small [3] within its share: 0 has a use and goes round, 1 is evicted. LRU would evict 3.
  CHECK(run("s3fifo", one_layer(3), in_layer_0({0, 1, 2, 3, 0, 1, 0, 4})) == "---012H1");
}

TEST_CASE("gate: five-access traces") {
  // 4 experts, 2 slots. A token adds (1 - k) / 2 times its use and its score and keeps k = 2^(-1/16) = 0.958 of the
  // rest; in units of (1 - k) / 2, when token 2 has been routed:
  //   expert 0: 1.9 k^2 + 0.4 k + 0.5 = 2.63    expert 1: 0.1 k^2 + 1.6 k + 0 = 1.62
  // so 2 evicts 1. After token 3: expert 0: 2.63 k + 0.3 = 2.81, expert 2: 1.5 k + 0 = 1.44, so 1 evicts 2.
  const PolicyFacts facts{1, 4, 1, 2};
  const std::vector<Scores> scores = {{0.9, 0.1}, {0.4, 0.6}, {0.5, 0, 0.5}, {0.3, 0.7}, {1.0}};
  CHECK(run("gate", facts, in_layer_0({0, 1, 2, 1, 0}, scores)) == "--12H");
  // After token 3: expert 0: 1.9 (k^3 + k^2) + 0.4 k + 0 = 3.79, expert 1: 0.1 (k^3 + k^2) + 1.6 k + 0.3 = 2.01: 2
  // evicts 1, although the last token does not think of 0 at all.
  const std::vector<Scores> later = {{0.9, 0.1}, {0.9, 0.1}, {0.4, 0.6}, {0, 0.3, 0.7}, {1.0}};
  CHECK(run("gate", facts, in_layer_0({0, 0, 1, 2, 0}, later)) == "-H-1H");
}

TEST_CASE("learned: five-access traces") {
  // 4 experts, 2 slots. Weights begin as 0.2 for the log odds of the last score (less an even router's, -1.11; odds are
  // (p + 1/120) / (1 - p + 1/120)), 0.8 for the short mean (0.206 per use, 0.794 of it a token later), 4.7 for the long
  // mean (0.0143 per use). Five tokens change them by a few hundredths. The sums after token 2, constant apart:
  //   expert 0, p 0.5:  0.2 * 1.11  + 0.8 * 0.130 + 4.7 * 0.0139 =  0.39
  //   expert 1, p 0:    0.2 * -3.69 + 0.8 * 0.164 + 4.7 * 0.0141 = -0.54    2 evicts 1
  // and after token 3:
  //   expert 0, p 0.3:  0.2 * 0.28  + 0.8 * 0.103 + 4.7 * 0.0137 =  0.20
  //   expert 2, p 0:    0.2 * -3.69 + 0.8 * 0.164 + 4.7 * 0.0141 = -0.54    1 evicts 2
  const PolicyFacts facts{1, 4, 1, 2};
  const std::vector<Scores> scores = {{0.9, 0.1}, {0.4, 0.6}, {0.5, 0, 0.5}, {0.3, 0.7}, {1.0}};
  CHECK(run("learned", facts, in_layer_0({0, 1, 2, 1, 0}, scores)) == "--12H");
  // The trace on which gate keeps 0. After token 3:
  //   expert 0, p 0:    0.2 * -3.69 + 0.8 * 0.233 + 4.7 * 0.0277 = -0.42
  //   expert 1, p 0.3:  0.2 * 0.28  + 0.8 * 0.164 + 4.7 * 0.0141 =  0.25    2 evicts 0
  const std::vector<Scores> later = {{0.9, 0.1}, {0.9, 0.1}, {0.4, 0.6}, {0, 0.3, 0.7}, {0, 1.0}};
  CHECK(run("learned", facts, in_layer_0({0, 0, 1, 2, 1}, later)) == "-H-0H");
}

TEST_CASE("learned: learns what foretells a use") {
  // Two experts take turns, and the router is sure of the one in use: what it scores high comes later.
  const PolicyFacts facts{1, 2, 1, 2};
  Driven driven(facts, make_policy("learned", facts));
  std::vector<Access> turns;
  for (uint64_t i = 0; i < 400; ++i)
    turns.push_back({{0, static_cast<int32_t>(i % 2)}, i, i % 2 == 0 ? Scores{1, 0} : Scores{0, 1}});
  driven.run({turns[0], turns[1]});
  CHECK(driven.victim({0, 0}) == ExpertKey{0, 0});
  driven.run({turns.begin() + 2, turns.end()});
  CHECK(driven.victim({0, 0}) == ExpertKey{0, 1});
  driven.clear();
  driven.run({turns[0], turns[1]});
  CHECK(driven.victim({0, 0}) == ExpertKey{0, 0});
}

TEST_CASE("gate, learned: among equals the layer whose turn comes last") {
  for (const char* name : {"gate", "learned"}) {
    const PolicyFacts facts{3, 2, 1, 3};
    Driven driven(facts, make_policy(name, facts));
    // The layers are routed alike.
    for (int32_t layer = 0; layer < 3; ++layer) driven.run({{{layer, 0}, 0, {0.8, 0.2}}});
    for (int32_t layer = 0; layer < 3; ++layer) {
      CHECK(driven.victim({layer, 1}) == ExpertKey{layer, 0});
      // The layer before has its turn next to last.
      CHECK(driven.victim({layer, 1}, [&](ExpertKey key) { return key.layer == layer; }) ==
            ExpertKey{(layer + 2) % 3, 0});
    }
  }
}

TEST_CASE("gate, learned: scores are needed") {
  for (const char* name : {"gate", "learned"}) {
    const std::unique_ptr<CachePolicy> policy = make_policy(name, one_layer(2));
    CHECK(policy->wants_scores());
    CHECK_THROWS_AS(policy->on_route(0, std::vector<int32_t>{1}, {}, 0), Error);
  }
  for (const char* name : {"lru", "lfu", "lfu-history", "lfu-layer", "lrfu", "s3fifo"})
    CHECK(!make_policy(name, one_layer(2))->wants_scores());
}

TEST_CASE("opt, opt-bypass: five-access traces") {
  // 2 slots. At 2, 0 comes next at time 3, 1 at time 4: 1 goes. 0 is a hit. At 1 neither 0 nor 2 comes again; of those
  // the higher id goes.
  CHECK(run_oracle("opt", 2, {0, 1, 2, 0, 1}) == "--1H2");
  // With the bypass 2, which never comes again, stays outside.
  CHECK(run_oracle("opt-bypass", 2, {0, 1, 2, 0, 1}) == "--xHH");
  // 2 comes again sooner than 1: admitted. At 1 nothing comes again, and the higher id goes as with OPT.
  CHECK(run_oracle("opt-bypass", 2, {0, 1, 2, 0, 2, 1}) == "--1HH2");
  // 1 slot: forced admission keeps nothing, the bypass keeps 0.
  CHECK(run_oracle("opt", 1, {0, 1, 0, 2, 0}) == "-0102");
  CHECK(run_oracle("opt-bypass", 1, {0, 1, 0, 2, 0}) == "-xHxH");
}

TEST_CASE("opt: what lies behind the horizon is not foreseen") {
  // 2 slots. In sight of everything 2 evicts 1. With the horizon at time 4, 1 is not seen to come again and 0 is: the
  // same. With the horizon at time 3 neither is: the higher id goes as well. With 0 and 1 swapped it shows.
  CHECK(run_oracle("opt", 2, {1, 0, 2, 1, 0}) == "--0H2");
  CHECK(run_oracle("opt", 2, {1, 0, 2, 1, 0}, 0, 4).substr(0, 3) == "--0");
  CHECK(run_oracle("opt", 2, {1, 0, 2, 1, 0}, 0, 3).substr(0, 3) == "--1");
}

TEST_CASE("lopt: five-access traces") {
  // 2 slots. Without a window it is LRU: 2 evicts 0, 0 evicts 1, 1 evicts 2.
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 0, 1}, 0) == "--012");
  // The window of one shows 0 at 2: 1 goes. At the end it shows nothing: 2 is less recent than 0.
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 0, 1}, 1) == "--1H2");
  // The window of two shows both 0 and 1: the one that comes last goes.
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 0, 1}, 2) == "--1H2");
  // The window of one does not show 0 at 2, so it is LRU that lets 0 go; the window of two does.
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 2, 0}, 1) == "--0H1");
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 2, 0}, 2) == "--1HH");
  CHECK(run_oracle("opt", 2, {0, 1, 2, 2, 0}) == "--1HH");
  // The window ends at the horizon.
  CHECK(run_oracle("lopt", 2, {0, 1, 2, 2, 0}, 2, 4).substr(0, 3) == "--0");
}

TEST_CASE("every policy: the victim is a resident that is not pinned") {
  const PolicyFacts facts{2, 8, 1, 6};
  std::mt19937_64 random(7);
  std::vector<std::string> names = policy_names();
  names.insert(names.end(), {"opt", "opt-bypass", "lopt"});
  for (const std::string& name : names) {
    CAPTURE(name);
    const std::vector<Access> accesses = random_accesses(facts, 300, 5);
    std::vector<uint32_t> order;
    for (const Access& access : accesses) order.push_back(static_cast<uint32_t>(facts.id_of(access.key)));
    const Future future(order, facts.total());
    Clock clock{-1, future.length()};
    const bool oracle = name.find("opt") != std::string::npos;
    Driven driven(facts, oracle ? make_oracle(name, facts, future, clock, 20) : make_policy(name, facts), &clock);
    CHECK(driven.victim({0, 0}).layer == -1);
    for (const Access& access : accesses) {
      driven.run({access});
      const std::vector<ExpertKey>& residents = driven.residents();
      CHECK(driven.victim(access.key, kAllPinned).layer == -1);
      const ExpertKey only = residents[random() % residents.size()];
      CHECK(driven.victim(access.key, [&](ExpertKey key) { return key != only; }) == only);
      const ExpertKey not_this = residents[random() % residents.size()];
      const ExpertKey victim = driven.victim(access.key, [&](ExpertKey key) { return key == not_this; });
      CHECK(victim != not_this);
      CHECK((residents.size() == 1 || std::find(residents.begin(), residents.end(), victim) != residents.end()));
    }
    driven.clear();
    CHECK(driven.victim({0, 0}).layer == -1);
  }
}

TEST_CASE("every policy: a cleared one is cold") {
  const PolicyFacts facts{2, 8, 1, 5};
  for (const std::string& name : policy_names()) {
    CAPTURE(name);
    Driven used(facts, make_policy(name, facts)), fresh(facts, make_policy(name, facts));
    used.run(random_accesses(facts, 500, 1));
    used.clear();
    const std::vector<Access> next = random_accesses(facts, 500, 2);
    CHECK(used.run(next) == fresh.run(next));
  }
  for (const std::string name : {"opt", "opt-bypass", "lopt"}) {
    CAPTURE(name);
    const std::vector<Access> accesses = random_accesses(facts, 600, 3),
                              first(accesses.begin(), accesses.begin() + 300),
                              second(accesses.begin() + 300, accesses.end());
    std::vector<uint32_t> order;
    for (const Access& access : accesses) order.push_back(static_cast<uint32_t>(facts.id_of(access.key)));
    const Future future(order, facts.total());
    Clock clock{-1, 300};
    Driven used(facts, make_oracle(name, facts, future, clock, 12), &clock);
    used.run(first);
    used.clear();
    clock.horizon = 600;
    const std::string warm = used.run(second);
    clock.now = 299;
    CHECK(warm == Driven(facts, make_oracle(name, facts, future, clock, 12), &clock).run(second));
  }
}

TEST_CASE("every policy: the same accesses give the same victims") {
  const PolicyFacts facts{3, 8, 1, 7};
  const std::vector<Access> accesses = random_accesses(facts, 500, 4);
  for (const std::string& name : policy_names()) CHECK(run(name, facts, accesses) == run(name, facts, accesses));
}

TEST_CASE("lfu-layer: resize changes the shares") {
  // 4 slots: two per layer. Layer 1 has three, one above its share, so 0.1 evicts the least used of those: 1.1, which
  // is less recent than 1.2. With two slots the shares are one: layer 0 has its own, so 0.1 evicts 0.0.
  const PolicyFacts facts{2, 4, 1, 4};
  Driven driven(facts, make_policy("lfu-layer", facts));
  CHECK(driven.run({{{0, 0}, 0}, {{1, 0}, 0}, {{1, 1}, 1}, {{1, 2}, 2}, {{1, 0}, 3}}) == "----H");
  CHECK(driven.victim({0, 1}) == ExpertKey{1, 1});
  driven.policy().resize(2);
  CHECK(driven.victim({0, 1}) == ExpertKey{0, 0});
  driven.policy().resize(4);
  CHECK(driven.victim({0, 1}) == ExpertKey{1, 1});
}

TEST_CASE("s3fifo: resize changes the small queue's share") {
  // After five accesses small is [2, 3] and main [0]. The share is one with three slots and three with thirty.
  Driven driven(one_layer(3), make_policy("s3fifo", one_layer(3)));
  CHECK(driven.run(in_layer_0({0, 0, 1, 2, 3})) == "-H--1");
  CHECK(driven.victim({0, 4}) == ExpertKey{0, 2});
  driven.policy().resize(30);
  CHECK(driven.victim({0, 4}) == ExpertKey{0, 0});
  driven.policy().resize(3);
  CHECK(driven.victim({0, 4}) == ExpertKey{0, 2});
}

TEST_CASE("every other policy: resize changes no victim") {
  const PolicyFacts facts{2, 8, 1, 5};
  for (const char* name : {"lru", "lfu", "lfu-history", "lrfu", "gate", "learned"}) {
    CAPTURE(name);
    Driven resized(facts, make_policy(name, facts)), other(facts, make_policy(name, facts));
    const std::vector<Access> first = random_accesses(facts, 100, 8), second = random_accesses(facts, 100, 9);
    resized.run(first);
    other.run(first);
    resized.policy().resize(9);
    CHECK(resized.run(second) == other.run(second));
  }
}

TEST_CASE("a policy that does not exist is refused with the names of those that do") {
  std::vector<std::string> parts = policy_names();
  CHECK(parts ==
        std::vector<std::string>{"lru", "lfu", "lfu-history", "lfu-layer", "lrfu", "s3fifo", "gate", "learned"});
  parts.push_back("cache policy \"best\" is unknown; use one of: lru, lfu");
  expect_error([] { make_policy("best", one_layer(2)); }, parts);
  expect_error([] { make_policy("", one_layer(2)); }, {"cache policy \"\" is unknown"});
  // Oracles exist in simulation only.
  expect_error([] { make_policy("opt", one_layer(2)); }, {"cache policy \"opt\" is unknown"});
  CHECK(make_policy(kDefaultPolicy, one_layer(2)) != nullptr);
}
