// The whole engine on a toy artifact: the same tokens and logits whatever the budget, I/O mode and number of threads.
#include "engine/engine.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cfmoe/cfmoe.h"
#include "engine/session.h"
#include "expect_error.h"
#include "fixtures.h"
#include "plan_fixture.h"
#include "toy_artifact.h"

namespace cfmoe {
namespace {

using test::ToyArtifact;

EngineOptions options(double percent, const std::string& io = "buffered", int32_t threads = 2) {
  EngineOptions out;
  out.expert_percent = percent;
  out.io = io;
  out.threads = threads;
  out.log_events = true;
  return out;
}

std::vector<int32_t> prompt(int32_t length) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < length; ++i) tokens.push_back((i * 37 + 11) % 100);
  return tokens;
}

std::vector<int32_t> generate(Session& session, const std::vector<int32_t>& tokens, uint32_t count,
                              float temperature = 0) {
  std::vector<int32_t> out;
  SamplingOptions sampling;
  sampling.temperature = temperature;
  session.generate(tokens, count, sampling, {}, [&](int32_t token) {
    out.push_back(token);
    return true;
  });
  return out;
}

}  // namespace

TEST_CASE("the same tokens for every budget, I/O mode and number of threads") {
  const ToyArtifact artifact;
  for (int32_t length : {1, 7, 16, 50}) {
    for (float temperature : {0.0F, 0.8F}) {
      std::vector<int32_t> expected;
      for (double percent : {100.0, 50.0, 34.0}) {
        for (const char* io : {"buffered", "mmap", "auto"}) {
          for (int32_t threads : {1, 3}) {
            Engine engine(artifact.path(), options(percent, io, threads));
            Session session(engine);
            const auto tokens = generate(session, prompt(length), 30, temperature);
            CHECK(tokens.size() == 30);
            if (expected.empty()) expected = tokens;
            CHECK(tokens == expected);
          }
        }
      }
    }
  }
}

TEST_CASE("prefill in chunks, decode and turns give the same logits") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(50));
  Session session(engine);
  const auto tokens = prompt(45);
  std::vector<float> whole(45 * 100), other(45 * 100);
  session.feed(tokens, false, whole.data());
  CHECK(session.position() == 45);
  session.reset();
  session.feed(tokens, true, other.data());
  CHECK(other == whole);
  session.reset();
  std::fill(other.begin(), other.end(), 0.0F);
  session.feed(std::span(tokens).first(20), false, other.data());
  session.feed(std::span(tokens).subspan(20, 5), true, other.data() + 2000);
  session.feed(std::span(tokens).subspan(25), false, other.data() + 2500);
  CHECK(other == whole);
}

TEST_CASE("the last generated token is part of the conversation") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(100));
  Session session(engine);
  std::vector<int32_t> all = prompt(10);
  const auto first = generate(session, all, 5);
  CHECK(session.position() == 15);
  const std::vector<int32_t> next = {3, 1, 4};
  std::vector<float> logits(300), expected(18 * 100);
  session.feed(next, false, logits.data());
  CHECK(session.position() == 18);
  session.reset();
  all.insert(all.end(), first.begin(), first.end());
  all.insert(all.end(), next.begin(), next.end());
  session.feed(all, false, expected.data());
  CHECK(logits == std::vector<float>(expected.end() - 300, expected.end()));
}

TEST_CASE("going back leaves the conversation as it was, with warm experts") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(100));
  Session session(engine);
  const auto again = [&] {
    SamplingOptions penalty;
    penalty.repetition_penalty = 1.3F;
    std::vector<int32_t> out;
    session.generate(prompt(7), 12, penalty, {}, [&](int32_t token) {
      out.push_back(token);
      return true;
    });
    return out;
  };
  const auto first = generate(session, prompt(20), 9);  // the last token is generated, not read
  CHECK(session.position() == 29);
  const auto second = again();
  CHECK(session.position() == 48);
  session.rewind(29);
  CHECK(session.position() == 29);
  CHECK(again() == second);
  session.rewind(48);
  CHECK(session.position() == 48);
  CHECK_THROWS_WITH(session.rewind(49), doctest::Contains("has 48 tokens and cannot go back to 49"));
  session.rewind(28);
  generate(session, {{first.back()}}, 0);
  CHECK(again() == second);
  session.rewind(0);
  CHECK(session.metrics().prefill.tokens == 0);
  CHECK(generate(session, prompt(20), 9) == first);
  CHECK(engine.cache().metrics(Phase::kPrefill).misses == 0);
}

TEST_CASE("metrics agree with the event log") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(34));
  Session session(engine);
  generate(session, prompt(20), 41);
  uint64_t hits[2] = {0, 0}, accesses[2] = {0, 0}, first_hits = 0, first = 0;
  std::vector<AccessEvent> batch(7);
  while (const size_t count = session.take_events(batch)) {
    for (const AccessEvent& event : std::span(batch).first(count)) {
      const auto phase = static_cast<size_t>(event.phase);
      ++accesses[phase];
      hits[phase] += event.hit ? 1 : 0;
      if (phase == 1 && event.position < 20 + 32) {
        ++first;
        first_hits += event.hit ? 1 : 0;
      }
    }
  }
  for (const Phase phase : {Phase::kPrefill, Phase::kDecode}) {
    const PhaseMetrics& metrics = engine.cache().metrics(phase);
    CHECK(metrics.hits == hits[static_cast<size_t>(phase)]);
    CHECK(metrics.hits + metrics.misses == accesses[static_cast<size_t>(phase)]);
  }
  CHECK(accesses[1] == 40 * 2 * 2);
  CHECK(session.metrics().decode.tokens == 40);
  CHECK(session.metrics().prefill.tokens == 20);
  CHECK(session.metrics().first_32_accesses == first);
  CHECK(session.metrics().first_32_hits == first_hits);
}

TEST_CASE("stop tokens, callbacks and the end of the context end generation") {
  const ToyArtifact artifact;
  EngineOptions small = options(100);
  small.context_size = 20;
  Engine engine(artifact.path(), small);
  Session session(engine);
  const auto free_run = generate(session, prompt(5), 100);
  CHECK(free_run.size() == 16);  // the last is never read
  session.reset();
  std::vector<int32_t> taken;
  const auto take = [&](int32_t token) { return taken.push_back(token), taken.size() < 3; };
  session.generate(prompt(5), 100, {}, {}, take);
  CHECK(taken == std::vector<int32_t>(free_run.begin(), free_run.begin() + 3));
  session.reset();
  taken.clear();
  const std::vector<int32_t> stop = {free_run[1]};
  session.generate(prompt(5), 100, {}, stop, take);
  CHECK(taken.size() == (free_run[0] == free_run[1] ? 0 : 1));
  session.reset();
  test::expect_error([&] { generate(session, prompt(21), 1); },
                     {"21 tokens", "context of 20", "--context-size", "128"});
  test::expect_error([&] { generate(session, {5, 100}, 1); }, {"token 100", "vocabulary"});
  test::expect_error([&] { generate(session, {}, 1); }, {"no tokens"});
  test::expect_error([&] { Session second(engine); }, {"already has a session"});
  CHECK(generate(session, prompt(5), 100) == free_run);
}

TEST_CASE("cancelling ends the call and leaves the session usable") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(100));
  Session session(engine);
  std::thread canceller;
  int count = 0;
  CHECK_THROWS_WITH_AS(session.generate(prompt(5), 100, {}, {},
                                        [&](int32_t) {
                                          if (++count == 3) session.cancel();
                                          return true;
                                        }),
                       "cancelled", Error);
  CHECK(count == 3);
  CHECK(session.position() == 8);
  session.reset();
  CHECK(generate(session, prompt(5), 10).size() == 10);
}

TEST_CASE("budgets changed between tokens and turns, and trims from another thread, change no token") {
  const ToyArtifact artifact;
  std::vector<int32_t> expected;
  {
    Engine engine(artifact.path(), options(100));
    Session session(engine);
    expected = generate(session, prompt(40), 30);
  }
  for (const char* io : {"buffered", "mmap"}) {
    Engine engine(artifact.path(), options(100, io));
    Session session(engine);
    const EngineMemory first = engine.memory();
    CHECK(first.smallest_budget == first.fixed.sum() + 2 * test::kStride);
    CHECK(first.largest_budget == first.budget.budget_bytes);
    std::atomic<bool> done{false};
    std::thread presser([&] {
      for (uint64_t i = 0; !done; ++i) {
        engine.trim(i % 3 == 0 ? 0 : first.largest_budget - i % 5 * test::kStride);
        CHECK(engine.memory().budget.budget_bytes >= first.smallest_budget);
        std::this_thread::yield();
      }
    });
    std::vector<int32_t> tokens;
    std::vector<uint8_t> residents(6);
    const auto take = [&](int32_t token) {
      tokens.push_back(token);
      engine.set_budget(first.smallest_budget + tokens.size() % 5 * test::kStride, 0);
      engine.residents(residents);
      CHECK(std::count(residents.begin(), residents.end(), 1) >= 2);
      return true;
    };
    session.generate(prompt(40), 30, {}, {}, take);
    CHECK(tokens == expected);
    session.reset();
    tokens.clear();
    session.generate(prompt(40), 30, {}, {}, take);
    CHECK(tokens == expected);
    done = true;
    presser.join();
    engine.set_budget(0, 50);
    CHECK(engine.memory().budget.slots == 3);
  }
}

TEST_CASE("an engine is at work in one call only") {
  const ToyArtifact artifact;
  Engine engine(artifact.path(), options(100));
  Session session(engine);
  const auto busy = [](const std::function<void()>& call) { test::expect_error(call, {"at work in another call"}); };
  int called = 0;
  session.generate(prompt(5), 2, {}, {}, [&](int32_t) {
    busy([&] { session.reset(); });
    busy([&] { generate(session, prompt(1), 1); });
    std::thread([&] { busy([&] { engine.set_budget(0, 50); }); }).join();
    engine.set_budget(0, 50);
    return ++called > 0;
  });
  CHECK(called == 2);
  test::expect_error([&] { engine.set_budget(1000, 0); }, {"smallest that works"});
  CHECK(engine.memory().budget.slots == 3);
  engine.trim(0);
  CHECK(engine.memory().budget.slots == 2);
  CHECK(engine.memory().pool_bytes == 2 * test::kStride);
  engine.trim(engine.memory().largest_budget);
  CHECK(engine.memory().budget.slots == 2);
}

TEST_CASE("what is wrong with kernels and plans is told") {
  const auto open = [](const std::string& from, const std::string& to) {
    const ToyArtifact artifact(test::replaced(test::plan_text(), from, to));
    Engine engine(artifact.path(), options(100));
    Session session(engine);
    generate(session, prompt(3), 1);
  };
  test::expect_error([&] { open("\"embed\"", "\"nothing\""); }, {"kernels.so", "no kernel nothing"});
  test::expect_error([&] { open("\"embed\"", "\"broken\""); }, {"kernel broken failed", "broken on purpose"});
  test::expect_error([&] { open("[2, \"context\", 16]}, {", "[4, \"context\", 16]}, {"); }, {"KV cache"});
  test::expect_error(
      [&] {
        open("{\"op\": \"route\", \"layer\": 0, \"logits\": 3, \"ids\": 4, \"weights\": 5}, {",
             "{\"op\": \"call\", \"kernel\": \"spoil\", \"args\": [{\"buffer\": 4}]}, {");
      },
      {"not routed"});
}

TEST_CASE("the C API reports errors and checks its arguments") {
  const ToyArtifact artifact;
  char error[200] = "";
  cfmoe_engine* engine = nullptr;
  cfmoe_engine_options options;
  cfmoe_engine_options_init(&options);
  options.budget_bytes = 1000;
  CHECK(cfmoe_engine_open(artifact.path().c_str(), &options, &engine, error, sizeof(error)) == CFMOE_USER);
  CHECK(std::string(error).find("smallest that works") != std::string::npos);
  CHECK(engine == nullptr);
  options.struct_size = 4;
  CHECK(cfmoe_engine_open(artifact.path().c_str(), &options, &engine, error, 10) == CFMOE_USER);
  CHECK(std::string(error).size() == 9);
  CHECK(cfmoe_engine_open(nullptr, nullptr, &engine, nullptr, 0) == CFMOE_USER);
  CHECK(cfmoe_engine_open("/nowhere", nullptr, &engine, error, sizeof(error)) == CFMOE_USER);

  cfmoe_engine_options_init(&options);
  options.policy = "lru";
  options.expert_percent = 100;
  REQUIRE(cfmoe_engine_open(artifact.path().c_str(), &options, &engine, error, sizeof(error)) == CFMOE_OK);
  cfmoe_memory memory;
  cfmoe_engine_memory(engine, &memory);
  CHECK(memory.expert_slots == 6);
  CHECK(memory.weights_bytes + memory.kv_bytes + memory.workspace_bytes + memory.pool_bytes <= memory.budget_bytes);
  cfmoe_session* session = nullptr;
  REQUIRE(cfmoe_session_create(engine, &session, error, sizeof(error)) == CFMOE_OK);
  int32_t tokens[2] = {1, 2}, out[8];
  uint32_t count = 99;
  const int32_t none = 0;
  CHECK(cfmoe_session_generate(session, tokens, 2, 8, nullptr, &none, 0, nullptr, nullptr, out, &count, error,
                               sizeof(error)) == CFMOE_OK);
  CHECK(count == 8);
  CHECK(cfmoe_session_position(session) == 10);
  cfmoe_sampling sampling;
  cfmoe_sampling_init(&sampling);
  sampling.top_p = 2;
  CHECK(cfmoe_session_generate(session, tokens, 2, 8, &sampling, nullptr, 0, nullptr, nullptr, out, &count, error,
                               sizeof(error)) == CFMOE_USER);
  CHECK(count == 0);
  CHECK(cfmoe_session_feed(session, nullptr, 2, 0, nullptr, error, sizeof(error)) == CFMOE_USER);
  cfmoe_session_destroy(session);
  cfmoe_engine_close(engine);
  cfmoe_engine_close(nullptr);
}

}  // namespace cfmoe
