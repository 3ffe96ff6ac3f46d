// The sampler: greedy ties, filters, the generator's published values, and logits that are no numbers.
#include "engine/sampler.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "error.h"
#include "expect_error.h"

namespace cfmoe {
namespace {

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();

class Bench {
 public:
  Bench(const SamplingOptions& options, size_t vocabulary)
      : candidates_(vocabulary), seen_(vocabulary), sampler_(options, candidates_) {}
  int32_t sample(std::vector<float> logits) { return sampler_.sample(logits, seen_); }
  std::map<int32_t, int> count(const std::vector<float>& logits, int draws) {
    std::map<int32_t, int> counts;
    for (int i = 0; i < draws; ++i) ++counts[sample(logits)];
    return counts;
  }
  std::vector<uint8_t>& seen() { return seen_; }

 private:
  std::vector<Sampler::Candidate> candidates_;
  std::vector<uint8_t> seen_;
  Sampler sampler_;
};

}  // namespace

TEST_CASE("greedy takes the largest, the lower id of equals, and never what is no number") {
  Bench greedy({}, 4);
  CHECK(greedy.sample({1, 3, 3, 2}) == 1);
  CHECK(greedy.sample({kNan, 3, kNan, 5}) == 3);
  CHECK(greedy.sample({-kInfinity, -kInfinity, kNan, -kInfinity}) == 0);
  test::expect_error([&] { greedy.sample({kNan, kNan, kNan, kNan}); }, {"no logit"});
}

TEST_CASE("the penalty makes seen tokens less likely, whatever their sign") {
  SamplingOptions options;
  options.repetition_penalty = 2.0F;
  Bench sampler(options, 3);
  sampler.seen() = {1, 0, 0};
  CHECK(sampler.sample({3, 2, 1}) == 1);
  CHECK(sampler.sample({-1, -1.5F, -4}) == 1);
}

TEST_CASE("frequencies follow the softmax at the temperature") {
  SamplingOptions options;
  options.temperature = 2.0F;
  Bench sampler(options, 3);
  // Weights 4, 2, 1 after dividing by the temperature.
  auto counts = sampler.count({2 * std::log(4.0F), 2 * std::log(2.0F), 0}, 70'000);
  CHECK(counts[0] == doctest::Approx(40'000).epsilon(0.02));
  CHECK(counts[1] == doctest::Approx(20'000).epsilon(0.03));
  CHECK(counts[2] == doctest::Approx(10'000).epsilon(0.04));
}

TEST_CASE("top-k and top-p leave out the unlikely, ties by id") {
  SamplingOptions options;
  options.temperature = 1.0F;
  options.top_k = 2;
  CHECK(Bench(options, 5).count({1, 2, 1, 2, 1}, 200).size() == 2);
  auto tied = Bench(options, 4).count({0, 5, 0, 0}, 20'000);
  CHECK(tied.count(2) == 0);
  CHECK(tied.count(3) == 0);

  options.top_k = 0;
  // Probabilities .5, .25, .125, .125: two of them reach .7, three .8 (the lower id of the equal ones).
  const std::vector<float> logits = {0, std::log(2.0F), std::log(4.0F), 0};
  options.top_p = 0.7F;
  auto two = Bench(options, 4).count(logits, 5'000);
  CHECK(two.size() == 2);
  CHECK(two[2] == doctest::Approx(3'333).epsilon(0.05));
  options.top_p = 0.8F;
  auto three = Bench(options, 4).count(logits, 5'000);
  CHECK(three.size() == 3);
  CHECK(three.count(3) == 0);
  options.top_p = 1e-6F;
  CHECK(Bench(options, 4).count(logits, 100).size() == 1);
}

TEST_CASE("the same seed gives the same tokens, another seed others") {
  std::vector<float> logits(1000);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i * 37 % 101) * 0.01F;
  const auto tokens = [&](uint64_t seed) {
    SamplingOptions options;
    options.temperature = 0.9F;
    options.top_p = 0.95F;
    options.seed = seed;
    Bench sampler(options, logits.size());
    std::vector<int32_t> out;
    for (int i = 0; i < 50; ++i) out.push_back(sampler.sample(logits));
    return out;
  };
  CHECK(tokens(1) == tokens(1));
  CHECK(tokens(1) != tokens(2));
}

TEST_CASE("infinite and missing logits") {
  SamplingOptions options;
  options.temperature = 1.0F;
  Bench sampler(options, 4);
  CHECK(sampler.sample({0, kInfinity, kInfinity, 1}) == 1);
  auto counts = sampler.count({kNan, 1, -kInfinity, 1}, 1000);
  CHECK(counts.count(0) == 0);
  CHECK(counts.count(2) == 0);
  CHECK(counts.size() == 2);
  CHECK(sampler.sample({-kInfinity, -kInfinity, -kInfinity, -kInfinity}) == 0);
  test::expect_error([&] { sampler.sample({kNan, kNan, kNan, kNan}); }, {"no logit"});
}

TEST_CASE("the generator") {
  // First outputs of xoshiro256** whose state is splitmix64 of seed 0.
  Random random(0);
  CHECK(random.next() == 0x99ec5f36cb75f2b4U);
  CHECK(random.next() == 0xbf6e1f784956452aU);
  for (int i = 0; i < 1000; ++i) {
    const double u = random.uniform();
    CHECK((u >= 0 && u < 1));
  }
}

TEST_CASE("bad options name the value and what is allowed") {
  const auto refused = [](float temperature, int32_t top_k, float top_p, float penalty, const char* word) {
    test::expect_error([&] { check_sampling({temperature, top_k, top_p, penalty, 0}); }, {word, "use "});
  };
  refused(-1, 0, 1, 1, "temperature");
  refused(kNan, 0, 1, 1, "temperature");
  refused(1, -1, 1, 1, "top-k");
  refused(1, 0, 0, 1, "top-p");
  refused(1, 0, 1.5F, 1, "top-p");
  refused(1, 0, kNan, 1, "top-p");
  refused(1, 0, 1, 0, "penalty");
  refused(1, 0, 1, kInfinity, "penalty");
}

}  // namespace cfmoe
