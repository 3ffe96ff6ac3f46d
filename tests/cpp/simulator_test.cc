// The simulator: what it counts is what an expert cache does, and, as a reference, what the obvious programs count.
#include "simulate/simulator.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cache/expert_cache.h"
#include "cfmoe/simulate.h"
#include "expect_error.h"
#include "fake_store.h"
#include "naive_reference.h"
#include "trace/trace_recorder.h"
#include "trace_fixture.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

constexpr TraceShape kShape{kManyLayers, kManyExperts, kTopK, true};
constexpr int32_t kTotal = kManyLayers * kManyExperts;

// Two samples of two turns; in the second sample a prompt comes in two calls without hand-over between, of which the
// first does not end with a chunk.
Trace two_samples(uint32_t chunk_size, uint64_t seed = 1) {
  std::vector<TraceSegment> second = conversation({{7, 0}, {9, 6}, {3, 8}});
  second[0].hand_over = false;
  Trace trace = random_trace(kShape, joined(conversation({{19, 12}, {11, 9}}), second), seed);
  trace.chunk_size = chunk_size;
  return trace;
}

void check_equal(const Simulation& a, const Simulation& b) {
  CHECK(a.prefill.hits == b.prefill.hits);
  CHECK(a.prefill.misses == b.prefill.misses);
  CHECK(a.decode.hits == b.decode.hits);
  CHECK(a.decode.misses == b.decode.misses);
  CHECK(a.hand_over_loads == b.hand_over_loads);
  CHECK(a.decode_groups_by_misses == b.decode_groups_by_misses);
}

// Gives an expert cache the routing of a trace, call by call as the engine does, and counts as the simulator should.
class DrivenCache {
 public:
  // What has been counted after so many tokens, of which the last ends a chunk or a segment, or is decoded.
  struct Checkpoint {
    uint32_t tokens;
    Simulation counts;
  };

  DrivenCache(const Trace& trace, const std::string& policy, int32_t slots, bool warm)
      : trace_(trace), warm_(warm), recorder_(header(trace), true) {
    ExpertCacheOptions options;
    options.slots = slots;
    options.policy = policy;
    options.recorder = &recorder_;
    cache_ = std::make_unique<ExpertCache>(store_, kTopK, options);
    groups_.assign(kTopK + 1, 0);
    uint64_t offset = 0, next_position = 0;
    for (const TraceSegment& segment : trace.segments) {
      if (segment.begins_sample && warm) offset = next_position;
      if (segment.begins_sample && !warm) cache_->clear();
      run(segment, offset + segment.position);
      next_position = offset + segment.position + segment.tokens;
    }
    cache_->drain();
  }

  const std::vector<Checkpoint>& checkpoints() const { return checkpoints_; }
  Simulation result() {
    Simulation result = checkpoints_.back().counts;
    // Every miss and every hand-over's load is a read, and nothing else is.
    result.hand_over_loads = static_cast<uint64_t>(store_.total_reads()) - result.prefill.misses - result.decode.misses;
    return result;
  }
  const Trace& recorded() const { return recorder_.trace(); }

 private:
  static Trace header(Trace trace) {
    trace.segments.clear();
    trace.ids.clear();
    trace.scores.clear();
    return trace;
  }

  void run(const TraceSegment& segment, uint64_t position) {
    const bool prefill = segment.phase == Phase::kPrefill;
    for (uint32_t done = 0, count; done < segment.tokens; done += count) {
      count = prefill ? std::min(trace_.chunk_size, segment.tokens - done) : 1;
      for (int32_t layer = 0; layer < kManyLayers; ++layer) {
        if (prefill) {
          prefill_layer(layer, count, position + done);
        } else {
          decode_group(layer, position + done);
        }
      }
      token_ += count;
      if (done + count == segment.tokens && segment.hand_over) cache_->hand_over();
      const PhaseMetrics in_prefill = cache_->metrics(Phase::kPrefill), in_decode = cache_->metrics(Phase::kDecode);
      checkpoints_.push_back(
          {token_, {{in_prefill.hits, in_prefill.misses}, {in_decode.hits, in_decode.misses}, 0, groups_}});
    }
  }

  // Of the tokens from token_ on.
  std::vector<int32_t> ids(int32_t layer, uint32_t count) const {
    std::vector<int32_t> ids;
    for (uint32_t token = token_; token < token_ + count; ++token) {
      const size_t first = (token * kManyLayers + static_cast<size_t>(layer)) * kTopK;
      ids.insert(ids.end(), trace_.ids.begin() + static_cast<ptrdiff_t>(first),
                 trace_.ids.begin() + static_cast<ptrdiff_t>(first + kTopK));
    }
    return ids;
  }
  std::vector<uint16_t> scores(int32_t layer, uint32_t count) const {
    std::vector<uint16_t> scores;
    for (uint32_t token = token_; token < token_ + count; ++token) {
      const size_t first = (token * kManyLayers + static_cast<size_t>(layer)) * kManyExperts;
      scores.insert(scores.end(), trace_.scores.begin() + static_cast<ptrdiff_t>(first),
                    trace_.scores.begin() + static_cast<ptrdiff_t>(first + kManyExperts));
    }
    return scores;
  }
  void prefill_layer(int32_t layer, uint32_t count, uint64_t position) {
    const std::vector<int32_t> chosen = ids(layer, count);
    cache_->note_routing(Phase::kPrefill, layer, chosen, scores(layer, count), position);
    std::map<int32_t, uint64_t> last;
    for (size_t i = 0; i < chosen.size(); ++i) last[chosen[i]] = position + i / kTopK;
    std::vector<int32_t> experts;
    std::vector<uint64_t> positions;
    for (const auto& [expert, last_position] : last) {
      experts.push_back(expert);
      positions.push_back(last_position);
    }
    cache_->prefill_layer(layer, experts, positions, [](std::span<const ReadyExpert>) {});
  }
  void decode_group(int32_t layer, uint64_t position) {
    const uint64_t before = cache_->metrics(Phase::kDecode).misses;
    cache_->note_routing(Phase::kDecode, layer, ids(layer, 1), scores(layer, 1), position);
    cache_->decode_group(layer, ids(layer, 1), position, [](std::span<const ReadyExpert>) {});
    ++groups_[cache_->metrics(Phase::kDecode).misses - before];
  }

  const Trace& trace_;
  bool warm_;
  FakeStore store_;
  TraceRecorder recorder_;
  std::unique_ptr<ExpertCache> cache_;
  uint32_t token_ = 0;
  std::vector<uint64_t> groups_;
  std::vector<Checkpoint> checkpoints_;
};

SimulatorOptions reference(bool warm = false) { return {true, warm, 0}; }

}  // namespace

TEST_CASE("simulator: counts what an expert cache does") {
  for (const std::string& policy : policy_names()) {
    for (const int32_t slots : {2, 3, 5, 9, 16, 24}) {
      // Chunks within a prompt, the whole of it, and for some sizes a token each.
      for (const uint32_t chunk : {slots == 5 ? 1U : 4U, 256U}) {
        const bool warm = (slots + static_cast<int32_t>(chunk)) % 2 == 0;
        CAPTURE(policy);
        CAPTURE(slots);
        CAPTURE(chunk);
        CAPTURE(warm);
        const Trace trace = two_samples(chunk, static_cast<uint64_t>(slots));
        DrivenCache cache(trace, policy, slots, warm);
        check_equal(Simulator(trace, {false, warm, 0}).run(policy, slots, 0), cache.result());
      }
    }
  }
}

TEST_CASE("simulator: counts token by token what an expert cache does") {
  for (const char* policy : {"lru", "lfu-layer", "lrfu", "s3fifo", "gate", "learned"}) {
    for (const bool warm : {false, true}) {
      CAPTURE(policy);
      const Trace trace = two_samples(4);
      DrivenCache cache(trace, policy, 7, warm);
      for (const DrivenCache::Checkpoint& checkpoint : cache.checkpoints()) {
        CAPTURE(checkpoint.tokens);
        Simulation simulation = Simulator(first_tokens(trace, checkpoint.tokens), {false, warm, 0}).run(policy, 7, 0);
        simulation.hand_over_loads = 0;
        check_equal(simulation, checkpoint.counts);
      }
    }
  }
}

TEST_CASE("simulator: what an expert cache records is what it was given") {
  const Trace trace = two_samples(4);
  DrivenCache cache(trace, "lru", 6, false);
  CHECK(format_trace(cache.recorded()) == format_trace(trace));
}

TEST_CASE("simulator: hand-over loads what the prompt's end used") {
  // Two slots and one layer of four experts, top-1. The prompt is one chunk: 0, 1, 2 and then 3 are computed, in this
  // order, and 2 and 3 stay. The scores of the hand-over are 0.94 for 3, 0.96 for 2, 0.98 for 1 and 1 for 0: 0 and 1
  // are read again. Then 0 and 1 are hits, and 2 is a miss.
  Trace trace;
  trace.layers = trace.top_k = 1;
  trace.experts = 4;
  trace.segments = conversation({{4, 3}});
  trace.ids = {3, 2, 1, 0, 0, 1, 2};
  const Simulation with = Simulator(trace, {}).run("lru", 2, 0);
  CHECK(with.prefill.misses == 4);
  CHECK(with.hand_over_loads == 2);
  CHECK(with.decode.hits == 2);
  CHECK(with.decode_groups_by_misses == std::vector<uint64_t>{2, 1});
  // Without it 2 and 3 are there: 0 and 1 are misses, and so is 2, gone by then.
  trace.segments[0].hand_over = false;
  const Simulation without = Simulator(trace, {}).run("lru", 2, 0);
  CHECK(without.hand_over_loads == 0);
  CHECK(without.decode.misses == 3);
}

TEST_CASE("simulator: the reference counts as the obvious programs do") {
  for (const uint64_t seed : {1, 2}) {
    const Trace trace = two_samples(256, seed);
    for (const bool warm : {false, true}) {
      const Simulator simulator(trace, reference(warm));
      const NaiveReference naive(trace, warm);
      for (const int32_t slots : {0, 1, 2, 3, 6, 11, 17, 23, 24}) {
        CAPTURE(seed);
        CAPTURE(warm);
        CAPTURE(slots);
        const auto size = static_cast<size_t>(slots);
        const Simulation lru = naive.run(size, naive_lru), opt = naive.run(size, naive_belady);
        check_equal(simulator.run("lru", slots, 0), lru);
        check_equal(simulator.run("lopt", slots, 0), lru);
        check_equal(simulator.run("lfu", slots, 0), naive.run(size, naive_lfu));
        for (const uint32_t lookahead : {1U, 5U, 6U, 40U})
          check_equal(simulator.run("lopt", slots, lookahead), naive.run(size, naive_lopt(lookahead)));
        // Among experts that nobody uses again the choice is free: the sums agree.
        const auto sum = [](const Simulation& s) { return s.prefill.hits + s.decode.hits; };
        CHECK(sum(simulator.run("opt", slots, 0)) == sum(opt));
        CHECK(sum(simulator.run("opt-bypass", slots, 0)) == sum(naive.run(size, naive_belady_bypass)));
        CHECK(sum(simulator.run("lopt", slots, 0xFFFFFFFF)) == sum(opt));
      }
    }
  }
}

TEST_CASE("simulator: no slots, one, one token's working set, everything") {
  const Trace trace = two_samples(4);
  for (const bool warm : {false, true}) {
    const Simulator as_reference(trace, reference(warm)), as_engine(trace, {false, warm, 0});
    const uint64_t accesses = trace.ids.size(), compulsory = NaiveReference(trace, warm).compulsory();
    for (const std::string& policy : Simulator::policy_names()) {
      CAPTURE(policy);
      const auto hits = [&](int64_t slots) {
        const Simulation result = as_reference.run(policy, slots, 20);
        CHECK(result.prefill.hits + result.prefill.misses + result.decode.hits + result.decode.misses == accesses);
        CHECK(result.hand_over_loads == 0);
        return result.prefill.hits + result.decode.hits;
      };
      CHECK(hits(0) == 0);
      // The stream never names an expert twice in a row: one slot helps only who may leave experts out.
      CHECK((policy == "opt-bypass" ? hits(1) > 0 : hits(1) == 0));
      CHECK(hits(kManyLayers * kTopK) > 0);
      CHECK(hits(kTotal) == accesses - compulsory);
      CHECK(hits(int64_t{1} << 40) == accesses - compulsory);

      const Simulation all = as_engine.run(policy, kTotal, 20), more = as_engine.run(policy, kTotal + 1, 20);
      CHECK(all.prefill.misses + all.decode.misses == compulsory);
      CHECK(all.hand_over_loads == 0);
      check_equal(more, all);
      const Simulation least = as_engine.run(policy, kTopK, 20);
      // Accesses depend on routing and chunks alone.
      CHECK(least.prefill.hits + least.prefill.misses == all.prefill.hits + all.prefill.misses);
      CHECK(least.decode.hits + least.decode.misses == uint64_t{12 + 9 + 6 + 8} * kManyLayers * kTopK);
    }
  }
}

TEST_CASE("simulator: oracles foresee decode as the engine runs it") {
  // Three layers, top-2: six experts per token. With decode alone nothing is loaded early, so OPT is best, and each
  // group's members are there when the group ends.
  const Trace trace = random_trace(kShape, joined(conversation({{0, 40}}), conversation({{0, 30}})), 3);
  const Simulator simulator(trace, {});
  for (const int32_t slots : {2, 6, 10, 16, 20}) {
    CAPTURE(slots);
    const uint64_t opt = simulator.run("opt", slots, 0).decode.hits;
    CHECK(simulator.run("opt-bypass", slots, 0).decode.hits >= opt);
    for (const std::string& policy : policy_names()) CHECK(opt >= simulator.run(policy, slots, 0).decode.hits);
    CHECK(opt >= simulator.run("lopt", slots, 12).decode.hits);
  }
}

TEST_CASE("simulator: which chunk size counts") {
  const auto run = [](uint32_t of_trace, uint32_t of_option) {
    return Simulator(two_samples(of_trace), {false, false, of_option}).run("lru", 5, 0);
  };
  check_equal(run(4, 0), run(0, 4));
  check_equal(run(4, 7), run(0, 7));
  check_equal(run(0, 0), run(Simulator::kDefaultChunk, 0));
  CHECK(run(4, 0).prefill.misses != run(7, 0).prefill.misses);
}

TEST_CASE("simulator: runs side by side do not meet") {
  const Trace trace = two_samples(4);
  const Simulator simulator(trace, {});
  const std::vector<std::string> policies = Simulator::policy_names();
  std::vector<Simulation> results(policies.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < policies.size(); ++i)
    threads.emplace_back([&, i] { results[i] = simulator.run(policies[i], 8, 12); });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < policies.size(); ++i) check_equal(results[i], simulator.run(policies[i], 8, 12));
}

TEST_CASE("simulator: what it refuses") {
  const Trace trace = two_samples(4);
  const Simulator engine(trace, {}), as_reference(trace, reference());
  std::vector<std::string> known = Simulator::policy_names();
  CHECK(known == std::vector<std::string>{"lru", "lfu", "lfu-history", "lfu-layer", "lrfu", "s3fifo", "gate", "learned",
                                          "opt", "opt-bypass", "lopt"});
  known.push_back("cache policy \"belady\" is unknown; use one of: lru, ");
  expect_error([&] { engine.run("belady", 5, 0); }, known);
  expect_error([&] { engine.run("lru", 1, 0); },
               {"cache of 1 experts", "the 2 that one token needs", "use at least 2", "--semantics reference"});
  expect_error([&] { as_reference.run("lru", -1, 0); }, {"cache of -1 experts"});
  Trace large;
  large.layers = 17;  // 1,114,095 experts
  large.experts = 65535;
  large.top_k = 1;
  large.segments = conversation({{1, 0}});
  large.ids.resize(17);
  expect_error([&] { Simulator(large, {}); }, {"17 layers of 65535 experts", "more than the 1048576"});
  Trace without = trace;
  without.scores.clear();
  for (const char* policy : {"gate", "learned"}) {
    for (const bool reference : {false, true}) {
      const Simulator simulator(without, {reference, false, 0});
      expect_error([&] { simulator.run(policy, 5, 0); },
                   {"cache policy \"" + std::string(policy) + "\"", "scores", "record it again with --scores"});
      simulator.run("lrfu", 5, 0);
    }
  }
}

TEST_CASE("simulator: the C API") {
  const std::vector<uint8_t> bytes = format_trace(two_samples(4));
  char error[200] = "";
  cfmoe_simulator* simulator = nullptr;
  CHECK(cfmoe_simulator_create(nullptr, 0, "a", nullptr, &simulator, error, sizeof error) != CFMOE_OK);
  CHECK(cfmoe_simulator_create(bytes.data(), 100, "a.trace", nullptr, &simulator, error, sizeof error) == CFMOE_USER);
  CHECK(std::string(error) == "a.trace: has 100 bytes, too few for a trace; record the trace again");
  cfmoe_simulator_options options{4, 0, 0, 0};
  CHECK(cfmoe_simulator_create(bytes.data(), bytes.size(), "a", &options, &simulator, error, 10) != CFMOE_OK);
  CHECK(std::string(error).size() == 9);
  CHECK(simulator == nullptr);

  options = {sizeof options, 1, 0, 0};
  REQUIRE(cfmoe_simulator_create(bytes.data(), bytes.size(), "a", &options, &simulator, error, sizeof error) ==
          CFMOE_OK);
  const Simulation expected = Simulator(two_samples(4), reference()).run("lru", 7, 0);
  cfmoe_simulation result;
  uint64_t groups[kTopK + 1];
  REQUIRE(cfmoe_simulator_run(simulator, "lru", 7, 0, &result, groups, error, sizeof error) == CFMOE_OK);
  CHECK(result.prefill_hits == expected.prefill.hits);
  CHECK(result.prefill_misses == expected.prefill.misses);
  CHECK(result.decode_hits == expected.decode.hits);
  CHECK(result.decode_misses == expected.decode.misses);
  CHECK(result.hand_over_loads == 0);
  CHECK(std::equal(groups, groups + kTopK + 1, expected.decode_groups_by_misses.begin()));
  // Sizes that no integer of the inner side holds are all experts.
  CHECK(cfmoe_simulator_run(simulator, "lru", ~uint64_t{0}, 0, &result, nullptr, error, sizeof error) == CFMOE_OK);
  CHECK(result.prefill_misses + result.decode_misses == NaiveReference(two_samples(4), false).compulsory());
  CHECK(cfmoe_simulator_run(simulator, "none", 7, 0, &result, nullptr, error, sizeof error) == CFMOE_USER);
  CHECK(std::string(error).find("\"none\" is unknown") != std::string::npos);
  CHECK(cfmoe_simulator_run(simulator, nullptr, 7, 0, &result, nullptr, error, sizeof error) != CFMOE_OK);
  cfmoe_simulator_destroy(simulator);
  cfmoe_simulator_destroy(nullptr);
  CHECK(std::string(cfmoe_engine_policies()) == "lru,lfu,lfu-history,lfu-layer,lrfu,s3fifo,gate,learned");
  CHECK(std::string(cfmoe_simulator_policies()) == std::string(cfmoe_engine_policies()) + ",opt,opt-bypass,lopt");
  CHECK(std::string(cfmoe_default_policy()) == kDefaultPolicy);
}
