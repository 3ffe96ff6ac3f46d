// The budget's arithmetic, and what the system says about memory.
#include "engine/budget.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "error.h"

namespace cfmoe {
namespace {

// Left to the system when all experts are wanted: the process's code, heap and what else runs.
constexpr uint64_t kReserveBytes = uint64_t{64} << 20;

std::string parts_text(const FixedParts& fixed, int32_t top_k) {
  return "weights " + format_mib(fixed.weights_bytes) + ", KV " + format_mib(fixed.kv_bytes) + ", workspace " +
         format_mib(fixed.workspace_bytes) + ", " + std::to_string(top_k) + " experts";
}

std::string percent_text(double percent) {
  std::ostringstream out;
  out << percent << "%";
  return out.str();
}

bool read_number(const std::string& path, uint64_t* value) {
  std::ifstream file(path);
  return static_cast<bool>(file >> *value);
}

// What is left below the limit of one control group; files that the kernel can drop do not count as used.
uint64_t group_headroom(const std::string& directory, const char* limit_name, const char* usage_name, uint64_t best) {
  uint64_t limit = 0, usage = 0;
  if (!read_number(directory + limit_name, &limit) || !read_number(directory + usage_name, &usage)) return best;
  std::ifstream stat(directory + "memory.stat");
  std::string key;
  uint64_t value = 0;
  while (stat >> key >> value) {
    if (key == "inactive_file" || key == "total_inactive_file") usage -= std::min(usage, value);
  }
  return std::min(best, limit > usage ? limit - usage : 1);
}

}  // namespace

std::string format_mib(uint64_t bytes) {
  const uint64_t mib = bytes >> 20;
  const uint64_t rest = bytes & ((uint64_t{1} << 20) - 1);
  uint64_t hundredths = (rest * 100 + (uint64_t{1} << 20) - 1) >> 20;
  const uint64_t whole = mib + hundredths / 100;
  hundredths %= 100;
  return std::to_string(whole) + "." + (hundredths < 10 ? "0" : "") + std::to_string(hundredths) + " MiB";
}

BudgetPlan plan_budget(const FixedParts& fixed, uint64_t record_stride, int32_t experts_total, int32_t top_k,
                       const BudgetRequest& request) {
  const uint64_t sum = fixed.sum();
  const uint64_t smallest = sum + static_cast<uint64_t>(top_k) * record_stride;
  BudgetPlan plan;
  const auto fits = [&](uint64_t bytes) {
    return static_cast<int32_t>(
        std::min<uint64_t>(static_cast<uint64_t>(experts_total), (bytes - sum) / record_stride));
  };
  if (request.budget_bytes > 0) {
    if (request.budget_bytes < smallest) {
      throw Error("--memory-budget " + format_mib(request.budget_bytes) +
                  " is below the smallest that works for this artifact and context, " + format_mib(smallest) + " (" +
                  parts_text(fixed, top_k) + "): use at least " + format_mib(smallest) + " (" +
                  std::to_string(smallest) + " bytes) or lower --context-size");
    }
    plan.slots = fits(request.budget_bytes);
    plan.budget_bytes = request.budget_bytes;
    return plan;
  }
  if (request.expert_percent != 0) {
    if (!(request.expert_percent > 0 && request.expert_percent <= 100)) {
      throw Error("--memory-budget " + percent_text(request.expert_percent) +
                  " is no share of the experts: use more than 0% and at most 100%");
    }
    // The nudge undoes binary rounding: 7% of 100 experts are 7.
    plan.slots = static_cast<int32_t>(std::floor(request.expert_percent * experts_total / 100.0 + 1e-9));
    if (plan.slots < top_k) {
      const double least = std::ceil(10000.0 * top_k / experts_total) / 100.0;
      throw Error("--memory-budget " + percent_text(request.expert_percent) + " keeps " + std::to_string(plan.slots) +
                  " of " + std::to_string(experts_total) + " experts, fewer than the " + std::to_string(top_k) +
                  " that one token uses: use at least " + percent_text(least) + " or " + format_mib(smallest));
    }
    plan.budget_bytes = sum + static_cast<uint64_t>(plan.slots) * record_stride;
    return plan;
  }
  plan.slots = experts_total;
  const uint64_t all = sum + static_cast<uint64_t>(experts_total) * record_stride;
  if (request.available_bytes > 0 && request.available_bytes < all + kReserveBytes) {
    const uint64_t usable = request.available_bytes > kReserveBytes ? request.available_bytes - kReserveBytes : 0;
    if (usable < smallest) {
      throw Error(
          "only " + format_mib(request.available_bytes) +
          " of memory are available and this artifact and context need at least " +
          format_mib(smallest + kReserveBytes) + " (" + parts_text(fixed, top_k) +
          ", the system's reserve): free memory, lower --context-size, or give --memory-budget to go on all the same");
    }
    plan.slots = fits(usable);
    plan.warning = "all experts need " + format_mib(all) + " and " + format_mib(request.available_bytes) +
                   " are available: keeping " + std::to_string(plan.slots) + " of " + std::to_string(experts_total) +
                   " experts";
  }
  plan.budget_bytes = sum + static_cast<uint64_t>(plan.slots) * record_stride;
  return plan;
}

uint64_t available_memory() {
  uint64_t available = 0;
  std::ifstream meminfo("/proc/meminfo");
  std::string line;
  while (std::getline(meminfo, line)) {
    std::istringstream fields(line);
    std::string key;
    uint64_t kib = 0;
    if (fields >> key >> kib && key == "MemAvailable:") available = kib << 10;
  }
  if (available == 0) return 0;
  // Version 2 has one hierarchy, "0::/path", and every ancestor may limit; version 1 names its controllers.
  std::ifstream groups("/proc/self/cgroup");
  while (std::getline(groups, line)) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool version2 = controllers.empty();
    if (!version2 && controllers != "memory") continue;
    const std::string root = version2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    for (;;) {
      if (!path.empty() && path.back() == '/') path.pop_back();
      available = version2
                      ? group_headroom(root + path + "/", "memory.max", "memory.current", available)
                      : group_headroom(root + path + "/", "memory.limit_in_bytes", "memory.usage_in_bytes", available);
      if (path.empty()) break;
      const size_t slash = path.rfind('/');
      path.erase(slash == std::string::npos ? 0 : slash);
    }
  }
  return available;
}

}  // namespace cfmoe
