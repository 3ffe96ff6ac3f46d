// Turns a memory budget into a number of expert slots, or into an error that names the smallest budget that works.
#pragma once

#include <cstdint>
#include <string>

namespace cfmoe {

struct FixedParts {
  uint64_t weights_bytes = 0;
  uint64_t kv_bytes = 0;
  uint64_t workspace_bytes = 0;
  uint64_t sum() const { return weights_bytes + kv_bytes + workspace_bytes; }
};

struct BudgetRequest {
  uint64_t budget_bytes = 0;     // 0: see expert_percent
  double expert_percent = 0.0;   // 0: all experts, as far as available_bytes go
  uint64_t available_bytes = 0;  // what the system can still give; 0: unknown
};

struct BudgetPlan {
  int32_t slots = 0;
  uint64_t budget_bytes = 0;  // the resolved sum
  std::string warning;        // "" if none
};

// Pure. Throws cfmoe::Error (user error) where fewer than top_k slots fit.
BudgetPlan plan_budget(const FixedParts& fixed, uint64_t record_stride, int32_t experts_total, int32_t top_k,
                       const BudgetRequest& request);

// "5.20 MiB", rounded up so that the text read as a budget is never less than `bytes`.
std::string format_mib(uint64_t bytes);

// Memory that this process can still take: the system's and its control group's, whichever is less; 0 where unknown.
uint64_t available_memory();

}  // namespace cfmoe
