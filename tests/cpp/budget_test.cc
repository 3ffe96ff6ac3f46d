// The budget: slots, the smallest budget that works, and the message that names it.
#include "engine/budget.h"

#include <doctest/doctest.h>

#include <string>

#include "expect_error.h"

namespace cfmoe {
namespace {

constexpr uint64_t kStride = 32768;
constexpr FixedParts kFixed{4'000'000, 500'000, 123'456};
constexpr uint64_t kSmallest = 4'623'456 + 4 * kStride;

BudgetPlan plan(uint64_t bytes, double percent = 0, uint64_t available = 0) {
  return plan_budget(kFixed, kStride, 192, 4, {bytes, percent, available});
}

}  // namespace

TEST_CASE("bytes become slots, at most all") {
  CHECK(plan(kSmallest).slots == 4);
  CHECK(plan(kSmallest + kStride - 1).slots == 4);
  CHECK(plan(kSmallest + kStride).slots == 5);
  CHECK(plan(uint64_t{1} << 62).slots == 192);
  CHECK(plan(kSmallest + kStride - 1).budget_bytes == kSmallest + kStride - 1);
}

TEST_CASE("a budget too small is refused with one that works") {
  test::expect_error([] { plan(kSmallest - 1); },
                     {"--memory-budget", "is below the smallest", std::to_string(kSmallest) + " bytes",
                      "--context-size", "4 experts"});
  test::expect_error([] { plan(3 << 20); }, {"--memory-budget 3.00 MiB", "4.54 MiB"});
  test::expect_error([] { plan(1); }, {"0.01 MiB"});
}

TEST_CASE("a budget as printed is never less than the bytes that it stands for") {
  CHECK(format_mib(0) == "0.00 MiB");
  CHECK(format_mib(1) == "0.01 MiB");
  CHECK(format_mib(uint64_t{5} << 20) == "5.00 MiB");
  CHECK(format_mib((uint64_t{5} << 20) - 1) == "5.00 MiB");
  CHECK(format_mib((uint64_t{5} << 20) + 1) == "5.01 MiB");
  for (uint64_t bytes = 1; bytes < (uint64_t{1} << 40); bytes = bytes * 3 + 7) {
    const std::string text = format_mib(bytes);
    const uint64_t whole = std::stoull(text), hundredths = std::stoull(text.substr(text.find('.') + 1, 2));
    CHECK((((whole * 100 + hundredths) << 20) / 100) >= bytes);
  }
}

TEST_CASE("a share of the experts") {
  CHECK(plan(0, 50).slots == 96);
  CHECK(plan(0, 100).slots == 192);
  CHECK(plan(0, 2.09).slots == 4);
  CHECK(plan(0, 50).budget_bytes == kFixed.sum() + 96 * kStride);
  CHECK(plan_budget(kFixed, kStride, 100, 4, {0, 7, 0}).slots == 7);
  test::expect_error([] { plan(0, 1); }, {"--memory-budget 1%", "keeps 1 of 192", "2.09%"});
  test::expect_error([] { plan(0, 101); }, {"101%"});
  test::expect_error([] { plan(0, -5); }, {"-5%"});
}

TEST_CASE("by default all experts, as far as memory goes") {
  const uint64_t all = kFixed.sum() + 192 * kStride;
  CHECK(plan(0, 0, 0).slots == 192);
  CHECK(plan(0, 0, uint64_t{1} << 40).slots == 192);
  CHECK(plan(0, 0, uint64_t{1} << 40).warning.empty());
  const BudgetPlan tight = plan(0, 0, all + (uint64_t{60} << 20));
  CHECK(tight.slots < 192);
  CHECK(tight.slots >= 4);
  CHECK(tight.budget_bytes <= all - (uint64_t{4} << 20) + (uint64_t{64} << 10));
  CHECK(tight.warning.find("of 192 experts") != std::string::npos);
  test::expect_error([] { plan(0, 0, 1000); }, {"memory are available", "--memory-budget"});
}

TEST_CASE("the system's memory is known") { CHECK(available_memory() > 0); }

}  // namespace cfmoe
