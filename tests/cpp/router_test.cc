// Routing: values worked out by hand, ties, and scores that are no numbers.
#include "engine/router.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "engine/exponential.h"

namespace cfmoe {
namespace {

struct Routed {
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

Routed route(const RouterOptions& options, const std::vector<float>& logits, int64_t n, int64_t stride) {
  Routed out{std::vector<int32_t>(n * options.top_k, -7), std::vector<float>(n * options.top_k)};
  Router(options, {}).route(logits.data(), n, stride, out.ids.data(), out.weights.data());
  return out;
}

}  // namespace

TEST_CASE("softmax over all experts, then top-k, then renormalised") {
  // softmax of (0, ln 2, ln 4, ln 1) is (1, 2, 4, 1) / 8; the fifth score of a row is padding.
  const float l2 = std::log(2.0F), l4 = std::log(4.0F);
  const std::vector<float> logits = {0, l2, l4, 0, 99, 50, 50 + l4, 50, 50 + l2, 99};
  Routed plain = route({false, 4, 2, false, 1.0F}, logits, 2, 5);
  CHECK(plain.ids == std::vector<int32_t>{2, 1, 1, 3});
  CHECK(plain.weights[0] == doctest::Approx(0.5));
  CHECK(plain.weights[1] == doctest::Approx(0.25));
  CHECK(plain.weights[2] == doctest::Approx(0.5));
  Routed scaled = route({false, 4, 2, true, 3.0F}, logits, 2, 5);
  CHECK(scaled.ids == plain.ids);
  CHECK(scaled.weights[0] == doctest::Approx(2.0));
  CHECK(scaled.weights[1] == doctest::Approx(1.0));
}

TEST_CASE("ties go to the lower id") {
  CHECK(route({false, 6, 4, false, 1.0F}, {1, 2, 1, 2, 1, 2}, 1, 6).ids == std::vector<int32_t>{1, 3, 5, 0});
}

TEST_CASE("sigmoid scores") {
  Routed out = route({true, 3, 3, false, 1.0F}, {0, 100, -100}, 1, 3);
  CHECK(out.ids == std::vector<int32_t>{1, 0, 2});
  CHECK(out.weights[1] == doctest::Approx(0.5));
  CHECK(out.weights[0] == doctest::Approx(1.0));
  CHECK(out.weights[2] == doctest::Approx(0.0));
}

TEST_CASE("only experts of the best groups are chosen, their scores stay those of all experts") {
  // softmax is (1, 2, 8, 1, 4, 3, 4, 1) / 24; the best of each group of two: 2, 8, 4, 4. Ties go to the lower group.
  std::vector<float> logits;
  for (const float share : {1.0F, 2.0F, 8.0F, 1.0F, 4.0F, 3.0F, 4.0F, 1.0F}) logits.push_back(std::log(share));
  std::vector<int32_t> ids(3, -7);
  std::vector<float> weights(3);
  std::vector<uint16_t> kept(8);
  Router router({false, 8, 3, false, 6.0F}, kept);
  router.route(logits.data(), 1, 8, ids.data(), weights.data(), {4, 2});
  CHECK(ids == std::vector<int32_t>{2, 4, 5});
  CHECK(weights[0] == doctest::Approx(2.0));
  CHECK(weights[2] == doctest::Approx(0.75));
  // What a cache policy sees includes the groups that were left out.
  CHECK(router.kept_scores()[6] == doctest::Approx(65535 / 6.0).epsilon(0.001));
  router.route(logits.data(), 1, 8, ids.data(), weights.data(), {4, 4});
  CHECK(ids == std::vector<int32_t>{2, 4, 6});
  router.route(logits.data(), 1, 8, ids.data(), weights.data());
  CHECK(ids == std::vector<int32_t>{2, 4, 6});
}

TEST_CASE("no expert of a group left out is chosen, even where scores are no numbers") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<int32_t> ids(2, -7);
  std::vector<float> weights(2);
  const std::vector<float> logits = {nan, 1, 2, nan, 0, 0};
  Router({true, 6, 2, false, 1.0F}, {}).route(logits.data(), 1, 6, ids.data(), weights.data(), {3, 1});
  CHECK(ids == std::vector<int32_t>{2, 3});
}

TEST_CASE("large scores stay finite and what is no number comes last, with valid ids") {
  Routed large = route({false, 3, 2, true, 1.0F}, {3e38F, -3e38F, 3e38F}, 1, 3);
  CHECK(large.ids == std::vector<int32_t>{0, 2});
  CHECK(large.weights[0] == doctest::Approx(0.5));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(route({false, 4, 4, false, 1.0F}, {nan, 1, nan, 2}, 1, 4).ids == std::vector<int32_t>{3, 1, 0, 2});
  CHECK(route({true, 3, 2, false, 1.0F}, {nan, nan, nan}, 1, 3).ids == std::vector<int32_t>{0, 1});
}

TEST_CASE("the exponential is exact to the last bits and has its limits") {
  for (double x = -708; x <= 709; x += 0.37) CHECK(exponential(x) == doctest::Approx(std::exp(x)).epsilon(4e-16));
  CHECK(exponential(0.0) == 1.0);
  CHECK(exponential(-709.0) == 0.0);
  CHECK(std::isinf(exponential(710.0)));
  CHECK(std::isnan(exponential(std::numeric_limits<double>::quiet_NaN())));
  // One value to the bit: it must not depend on the compiler.
  CHECK(std::bit_cast<uint64_t>(exponential(-1.5)) == 0x3fcc8f87724b5c1dU);
}

}  // namespace cfmoe
