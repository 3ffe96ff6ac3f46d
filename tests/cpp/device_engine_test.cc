// The whole engine on a device that puts its work off: the same tokens as on the CPU, whatever the memory, the budget
// and the placement of the phases; and what it says when the device fails.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/session.h"
#include "expect_error.h"
#include "fake_device.h"
#include "toy_gpu.h"

namespace cfmoe {
namespace {

using test::expect_error;
using test::fake_settings;
using test::FakeMetal;
using test::ToyGpuArtifact;

EngineOptions options(const std::string& prefill, const std::string& decode, double percent = 100,
                      const std::string& io = "buffered") {
  EngineOptions out;
  out.expert_percent = percent;
  out.io = io;
  out.threads = 2;
  out.log_events = true;
  out.placement.prefill_device = prefill;
  out.placement.decode_device = decode;
  return out;
}

// Shared memory, a device that reaches the host's, one that does not, and with either, commands in the order of their
// recording.
struct Memories {
  bool unified, binds_host, defers;
};
constexpr Memories kMemories[] = {
    {true, false, true}, {false, true, true}, {false, false, false}, {true, false, false}};

std::vector<int32_t> prompt(int32_t length) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < length; ++i) tokens.push_back((i * 37 + 11) % 100);
  return tokens;
}

std::vector<int32_t> generate(Session& session, int32_t length, uint32_t count) {
  std::vector<int32_t> out;
  session.generate(prompt(length), count, {}, {}, [&](int32_t token) {
    out.push_back(token);
    return true;
  });
  return out;
}

std::vector<int32_t> generate(const std::string& artifact, const EngineOptions& options, int32_t length) {
  Engine engine(artifact, options);
  Session session(engine);
  return generate(session, length, 30);
}

}  // namespace

TEST_CASE("devices: the CPU's tokens for every placement, budget, I/O mode and kind of memory") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  for (const int32_t length : {1, 7, 50}) {
    const auto expected = generate(artifact.path(), options("cpu", "cpu"), length);
    for (const auto& [unified, binds_host, defers] : kMemories) {
      fake_settings().unified = unified;
      fake_settings().binds_host = binds_host;
      fake_settings().defers = defers;
      for (const double percent : {100.0, 50.0, 34.0}) {
        for (const char* io : {"buffered", "auto", "mmap"}) {
          CHECK(generate(artifact.path(), options("metal", "metal", percent, io), length) == expected);
          if (!unified) continue;
          CHECK(generate(artifact.path(), options("metal", "cpu", percent, io), length) == expected);
          CHECK(generate(artifact.path(), options("cpu", "metal", percent, io), length) == expected);
        }
      }
    }
  }
  CHECK(fake_settings().live_bytes == 0);
}

TEST_CASE("devices: budgets shrink and grow between tokens, and memory is what they say") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  const auto expected = generate(artifact.path(), options("cpu", "cpu"), 20);
  for (const auto& [unified, binds_host, defers] : kMemories) {
    fake_settings().unified = unified;
    fake_settings().binds_host = binds_host;
    fake_settings().defers = defers;
    Engine engine(artifact.path(), options("metal", "metal"));
    Session session(engine);
    std::vector<int32_t> tokens;
    session.generate(prompt(20), 30, {}, {}, [&](int32_t token) {
      tokens.push_back(token);
      constexpr double kPercents[] = {34, 100, 67, 50, 84};
      engine.set_budget(0, kPercents[tokens.size() % 5]);
      if (tokens.size() % 7 == 0) engine.trim(0);
      const EngineMemory memory = engine.memory();
      CHECK(memory.pool_bytes == static_cast<uint64_t>(memory.budget.slots) * test::kStride);
      return true;
    });
    CHECK(tokens == expected);
    const EngineMemory memory = engine.memory();
    // Everything but what the host alone has: vocabulary, sampling, scores.
    CHECK(fake_settings().live_bytes <= static_cast<int64_t>(memory.budget.budget_bytes));
    CHECK(fake_settings().live_bytes >=
          static_cast<int64_t>(memory.fixed.weights_bytes + memory.fixed.kv_bytes + memory.pool_bytes));
  }
}

TEST_CASE("devices: one submission per layer when nothing has to be read") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  Engine engine(artifact.path(), options("metal", "metal"));
  Session session(engine);
  generate(session, 40, 2);
  const int64_t before = fake_settings().submits;
  session.feed(prompt(10), true, nullptr);
  // The token that was pending and ten more: two MoE layers wait for the router, and the last segment for its result.
  CHECK(fake_settings().submits - before == 33);
  std::vector<float> logits(10 * static_cast<size_t>(engine.model().vocab_size));
  session.feed(prompt(10), true, logits.data());
  // Logits are computed in the submission of the last layer.
  CHECK(fake_settings().submits - before == 63);
}

TEST_CASE("devices: a profile holds every part of what the host did") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  CHECK(Engine(artifact.path(), options("metal", "metal")).profiles().empty());
  EngineOptions profiled = options("metal", "metal");
  profiled.profile = ProfileMode::kHost;
  Engine engine(artifact.path(), profiled);
  Session session(engine);
  generate(session, 40, 2);
  engine.reset_profiles();
  session.feed(prompt(10), true, nullptr);
  const auto profiles = engine.profiles();
  REQUIRE(profiles.size() == 3);
  CHECK(profiles[0].first == "prefill");
  CHECK(profiles[0].second->runs() == 0);
  const device::Profile& decode = *profiles[1].second;
  CHECK(profiles[1].first == "decode");
  CHECK(decode.runs() == 11);
  CHECK(decode.host(device::HostPart::kRoute).calls == 22);
  CHECK(decode.host(device::HostPart::kExperts).calls == 22);
  CHECK(decode.host(device::HostPart::kWait).calls >= 33);
  CHECK(decode.host(device::HostPart::kRecord).seconds > 0);
}

TEST_CASE("devices: hits and misses are those of the CPU") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  std::vector<AccessEvent> events[2];
  for (const bool gpu : {false, true}) {
    const char* device = gpu ? "metal" : "cpu";
    Engine engine(artifact.path(), options(device, device, 50));
    Session session(engine);
    generate(session, 40, 30);
    std::vector<AccessEvent> batch(10'000);
    batch.resize(session.take_events(batch));
    events[gpu ? 1 : 0] = batch;
  }
  REQUIRE(events[0].size() == events[1].size());
  for (size_t i = 0; i < events[0].size(); ++i) {
    CHECK(events[0][i].key.expert == events[1][i].key.expert);
    CHECK(events[0][i].hit == events[1][i].hit);
  }
}

TEST_CASE("devices: what fails says what to do") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  const auto open = [&artifact](const std::string& prefill, const std::string& decode) {
    Engine(artifact.path(), options(prefill, decode));
  };
  expect_error([&] { open("gpu", "cpu"); }, {"--prefill-device gpu", "vulkan, opencl"});
  expect_error([&] { open("metal", "vulkan"); }, {"--prefill-device metal with --decode-device vulkan", "one copy"});
  fake_settings().unified = false;
  expect_error([&] { open("metal", "cpu"); }, {"--decode-device cpu", "Fake GPU", "--device metal"});
  fake_settings() = {};
  fake_settings().features = {};
  expect_error([&] { open("metal", "metal"); }, {"manifest.json", "metal-generic needs float16", "--device cpu"});
  fake_settings() = {};
  fake_settings().compiles = false;
  expect_error([&] { open("metal", "metal"); }, {"kernel attend does not compile", "--device cpu"});
  fake_settings() = {};
  fake_settings().memory_bytes = 100'000;
  expect_error([&] { open("metal", "metal"); }, {"out of device memory", "--memory-budget"});
  fake_settings() = {};
  fake_settings().max_buffer_bytes = 1024;
  expect_error([&] { open("metal", "metal"); }, {"largest buffer of", "--device cpu"});
  fake_settings() = {};
  {
    Engine engine(artifact.path(), options("metal", "metal"));
    Session session(engine);
    fake_settings().waits_until_lost = 3;
    CHECK_THROWS_WITH_AS(generate(session, 20, 5), doctest::Contains("device was lost"), Error);
    CHECK_THROWS_WITH_AS(generate(session, 20, 5), doctest::Contains("device was lost"), Error);
  }
  const test::ToyGpuArtifact wrong(test::replaced(
      test::gpu_plan_text(), "\"kernel\": \"combine\", \"args\": [{\"buffer\": 7}, {\"buffer\": 5}, {\"buffer\": 2}",
      "\"kernel\": \"combine\", \"args\": [{\"buffer\": 7}, {\"scalar\": 5}, {\"buffer\": 2}"));
  expect_error([&] { Engine(wrong.path(), options("metal", "metal")); }, {"plan.json", "args", "buffers come first"});
  const test::ToyGpuArtifact outside(
      test::replaced(test::gpu_plan_text(), "\"embed\": {\"code\": [0, 4]", "\"embed\": {\"code\": [2, 4]"));
  expect_error([&] { Engine(outside.path(), options("metal", "metal")); }, {"kernel embed", "outside its library"});
  const test::ToyGpuArtifact large(
      test::replaced(test::gpu_plan_text(), "\"local\": [32, 1, 1]", "\"local\": [512, 1, 1]"));
  expect_error([&] { Engine(large.path(), options("metal", "metal")); }, {"workgroups of 512", "256"});
  CHECK(fake_settings().live_bytes == 0);
}

TEST_CASE("devices: auto falls back to the CPU with one warning") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  const auto open = [&artifact] {
    EngineOptions options;
    options.expert_percent = 100;
    options.placement.device = "auto";
    return open_engine(artifact.path(), options);
  };
  CHECK(open()->device_of(Phase::kDecode) == "metal");
  CHECK(open()->warning().find("--device") == std::string::npos);
  fake_settings().compiles = false;
  const auto engine = open();
  CHECK(engine->device_of(Phase::kPrefill) == "cpu");
  CHECK(engine->warning().find("--device auto: running on the CPU: kernel attend does not compile") !=
        std::string::npos);
}

TEST_CASE("devices: after an error in the middle of a layer the next call is whole") {
  const FakeMetal metal;
  const ToyGpuArtifact artifact;
  const auto expected = generate(artifact.path(), options("cpu", "cpu"), 20);
  const std::string experts = artifact.path() + "/experts.bin";
  const std::string bytes = test::read_file(experts);
  Engine engine(artifact.path(), options("metal", "metal", 34));
  test::flip_bit(experts, 3 * test::kStride + 100);
  {
    Session session(engine);
    CHECK_THROWS_WITH_AS(generate(session, 20, 30), doctest::Contains("damaged"), Error);
  }
  test::write_file(experts, bytes);
  Session session(engine);
  CHECK(generate(session, 20, 30) == expected);
}

}  // namespace cfmoe
