// The C API of the simulator.
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "capi/guard.h"
#include "cfmoe/simulate.h"
#include "simulate/simulator.h"
#include "trace/trace.h"

using cfmoe::capi::guarded;
using cfmoe::capi::require;
using cfmoe::capi::require_size;

struct cfmoe_simulator {
  cfmoe::Simulator simulator;
};

namespace {

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ",") + name;
  return all;
}

}  // namespace

const char* cfmoe_engine_policies(void) {
  static const std::string names = joined(cfmoe::policy_names());
  return names.c_str();
}

const char* cfmoe_simulator_policies(void) {
  static const std::string names = joined(cfmoe::Simulator::policy_names());
  return names.c_str();
}

const char* cfmoe_default_policy(void) { return cfmoe::kDefaultPolicy; }

cfmoe_status cfmoe_simulator_create(const void* trace, size_t size, const char* name,
                                    const cfmoe_simulator_options* options, cfmoe_simulator** out, char* error,
                                    size_t error_size) {
  if (out != nullptr) *out = nullptr;
  return guarded(error, error_size, [&] {
    require(trace != nullptr && name != nullptr && out != nullptr, "trace, name or out is NULL");
    cfmoe::SimulatorOptions simulator;
    if (options != nullptr) {
      require_size(options->struct_size, sizeof(cfmoe_simulator_options), "cfmoe_simulator_options");
      simulator = {options->reference != 0, options->warm != 0, options->chunk_size};
    }
    const cfmoe::Trace parsed = cfmoe::parse_trace({static_cast<const uint8_t*>(trace), size}, name);
    *out = new cfmoe_simulator{cfmoe::Simulator(parsed, simulator)};
  });
}

void cfmoe_simulator_destroy(cfmoe_simulator* simulator) { delete simulator; }

cfmoe_status cfmoe_simulator_run(const cfmoe_simulator* simulator, const char* policy, uint64_t slots,
                                 uint32_t lookahead, cfmoe_simulation* out, uint64_t* groups_by_misses, char* error,
                                 size_t error_size) {
  return guarded(error, error_size, [&] {
    require(simulator != nullptr && policy != nullptr && out != nullptr, "simulator, policy or out is NULL");
    const int64_t bounded = slots > INT32_MAX ? INT32_MAX : static_cast<int64_t>(slots);
    const cfmoe::Simulation result = simulator->simulator.run(policy, bounded, lookahead);
    *out = {result.prefill.hits, result.prefill.misses, result.decode.hits, result.decode.misses,
            result.hand_over_loads};
    if (groups_by_misses != nullptr)
      std::copy(result.decode_groups_by_misses.begin(), result.decode_groups_by_misses.end(), groups_by_misses);
  });
}
