// Mutates valid artifact files and traces and checks that loading them, and replaying traces, gives a result or a
// cfmoe::Error, nothing else.
//   cfmoe_fuzz_load [RUNS] [SEED]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/index.h"
#include "artifact/manifest.h"
#include "engine/plan.h"
#include "error.h"
#include "fixtures.h"
#include "plan_fixture.h"
#include "simulate/simulator.h"
#include "tokenizer/byte_level_bpe.h"
#include "tokenizer_fixture.h"
#include "trace/trace.h"
#include "trace_fixture.h"

namespace {

using cfmoe::test::kExperts;
using cfmoe::test::kLayers;
using cfmoe::test::kStride;

struct Target {
  const char* name;
  std::string valid;
  std::function<void(const std::string&)> load;
  bool sealed = false;  // every change must be refused
  bool binary = false;
};

class Mutator {
 public:
  explicit Mutator(uint64_t seed) : random_(seed) {}

  std::string mutate(std::string text, bool binary) {
    for (size_t left = 1 + below(4); left > 0; --left) {
      if (binary) {
        change_number(&text);
      } else {
        change_once(&text);
      }
    }
    return text;
  }

 private:
  size_t below(size_t end) { return end == 0 ? 0 : std::uniform_int_distribution<size_t>(0, end - 1)(random_); }

  void change_once(std::string* text) {
    // Numbers at the edges of their types, and values of the wrong type, in the place of any token.
    static const std::vector<std::string> kValues = {"0",
                                                     "-1",
                                                     "1",
                                                     "2147483647",
                                                     "2147483648",
                                                     "4294967296",
                                                     "9223372036854775807",
                                                     "-9223372036854775808",
                                                     "1e308",
                                                     "0.5",
                                                     "NaN",
                                                     "-Infinity",
                                                     "null",
                                                     "true",
                                                     "\"\"",
                                                     "\"x\"",
                                                     "[]",
                                                     "{}",
                                                     "[[[[]]]]",
                                                     "\"\\ud800\"",
                                                     "\"../../x\"",
                                                     "18446744073709551616"};
    static constexpr std::string_view kBytes =
        "{}[]\",:\\0123456789-+.eE\n\t\x01\x7f\xff"
        "nutrfals";
    size_t at = below(text->size());
    switch (below(6)) {
      case 0:
        if (!text->empty()) (*text)[at] = static_cast<char>(static_cast<unsigned char>((*text)[at]) ^ (1u << below(8)));
        break;
      case 1: text->insert(at, 1, kBytes[below(kBytes.size())]); break;
      case 2: text->erase(at, 1 + below(20)); break;
      case 3: text->insert(at, text->substr(below(text->size()), below(40))); break;
      default: replace_token(text, at, kValues[below(kValues.size())]);
    }
  }

  // Numbers at the edges of their types, or a little more or less than before, mostly where header and table are;
  // seldom another length, which is refused at once.
  void change_number(std::string* bytes) {
    static constexpr uint64_t kEdges[] = {0,          1,          2,          255,        256,        257,
                                          1024,       65535,      65536,      1 << 20,    0x7FFFFFFF, 0x80000000,
                                          0xFFFFFFFF, 1ULL << 32, 1ULL << 48, 1ULL << 63, ~0ULL};
    const size_t width = size_t{1} << below(4);
    if (bytes->size() < 2 * width || below(20) == 0) {
      const size_t cut = below(bytes->size());
      bytes->erase(cut, below(8));
      bytes->insert(cut, below(8), '\7');
      return;
    }
    const size_t reach = below(3) > 0 ? std::min<size_t>(bytes->size(), 192) : bytes->size();
    const size_t at = below((reach - width) / width) * width;
    uint64_t value = 0;
    std::memcpy(&value, bytes->data() + at, width);
    value = below(2) == 0 ? value + below(5) - 2 : kEdges[below(std::size(kEdges))];
    std::memcpy(bytes->data() + at, &value, width);
  }

  static void replace_token(std::string* text, size_t at, const std::string& value) {
    size_t begin = text->find_first_of(":[,", at);
    if (begin == std::string::npos) return;
    size_t end = text->find_first_of(",]}", ++begin);
    if (end != std::string::npos) text->replace(begin, end - begin, value);
  }

  std::mt19937_64 random_;
};

std::string valid_trace(const cfmoe::test::TraceShape& shape) {
  using namespace cfmoe::test;
  const cfmoe::Trace trace = random_trace(shape, joined(conversation({{5, 3}, {2, 1}}), conversation({{4, 2}})), 1);
  const std::vector<uint8_t> bytes = cfmoe::format_trace(trace);
  return {bytes.begin(), bytes.end()};
}

// Replays a trace, if it is one, in a way that follows from its bytes.
void replay(const std::string& text) {
  using namespace cfmoe;
  std::vector<uint8_t> bytes(text.begin(), text.end());
  test::reseal(&bytes);
  const Trace trace = parse_trace(bytes, "a.trace");
  uint64_t choice = xxh3_64(text);
  const auto choose = [&](uint64_t count) { return std::exchange(choice, choice / count) % count; };
  const Simulator simulator(trace, {choose(2) == 0, choose(2) == 0, static_cast<uint32_t>(choose(2) * choose(6))});
  const std::vector<std::string> policies = Simulator::policy_names();
  const std::string& policy = policies[choose(policies.size())];
  const int64_t slots = static_cast<int64_t>(choose(2)) * trace.top_k + static_cast<int64_t>(choose(12));
  try {
    simulator.run(policy, slots, static_cast<uint32_t>(choose(30)));
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::kInternal) throw std::logic_error("replay with " + policy + ": " + error.what());
    throw;
  }
}

std::vector<Target> targets() {
  using namespace cfmoe;
  return {
      // Sealed again, so that the mutation gets past the digest.
      {"manifest", test::manifest_text(test::artifact_contents()),
       [](const std::string& text) { parse_manifest(test::seal(text), "manifest.json"); }},
      {"manifest, broken seal", test::manifest_text(test::artifact_contents()),
       [](const std::string& text) { parse_manifest(text, "manifest.json"); }, true},
      {"index", test::index_text(),
       [](const std::string& text) { parse_index(text, "index.json", 4096, kStride * kLayers * kExperts); }},
      {"plan", test::plan_text(),
       [manifest = parse_manifest(test::manifest_text(test::artifact_contents()), "manifest.json"),
        index = parse_index(test::index_text(), "index.json", 4096, kStride * kLayers * kExperts)](
           const std::string& text) { parse_plan(text, "plan.json", manifest, index); }},
      {"tokenizer", test::tokenizer_text(),
       [](const std::string& text) {
         const ByteLevelBpe bpe(text, "tokenizer.json");
         std::vector<int32_t> ids;
         bpe.encode("the thing <|end|> in 12  \n\u65E5 <|enx", &ids);
         for (const int32_t id : ids) bpe.bytes(id, false);
       }},
      {"trace", valid_trace({3, 8, 2, true}), replay, false, true},
      {"trace of many experts", valid_trace({2, 300, 2, false}), replay, false, true},
      {"trace, broken seals", valid_trace({3, 8, 2, true}),
       [](const std::string& text) {
         parse_trace({reinterpret_cast<const uint8_t*>(text.data()), text.size()}, "a.trace");
       },
       true, true},
  };
}

}  // namespace

int main(int argc, char** argv) {
  long runs = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 2000;
  unsigned long long seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (const Target& target : targets()) {
    target.load(target.valid);
    Mutator mutator(seed);
    long accepted = 0;
    for (long run = 0; run < runs; ++run) {
      std::string text = mutator.mutate(target.valid, target.binary);
      if (text == target.valid) continue;
      try {
        target.load(text);
        ++accepted;
        if (!target.sealed) continue;
        std::fprintf(stderr, "%s, seed %llu, run %ld: a changed file was accepted\n", target.name, seed, run);
        return 1;
      } catch (const cfmoe::Error& error) {
        if (std::string_view(error.what()).find('\n') == std::string_view::npos) continue;
        std::fprintf(stderr, "%s, seed %llu, run %ld: the message has several lines: %s\n", target.name, seed, run,
                     error.what());
        return 1;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s, seed %llu, run %ld: not a cfmoe::Error: %s\n", target.name, seed, run, error.what());
        return 1;
      }
    }
    std::printf("%s: %ld mutations, %ld of them still valid\n", target.name, runs, accepted);
  }
  return 0;
}
