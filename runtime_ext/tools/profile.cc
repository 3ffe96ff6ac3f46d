// Profiles of prefill and decode: kernels by the device's timestamps, the host's parts by its own clock.
#include "profile.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "error.h"

namespace cfmoe::tools {
namespace {

using device::HostPart;
using device::ProfileCost;

// A phase is what the session's clock measured together: decode is the programs decode and head.
struct PhaseProfile {
  uint64_t tokens = 0;
  double seconds = 0, timed_seconds = 0;  // undisturbed, and with timestamps
  std::map<std::string, ProfileCost> host, device;
};

// In the order in which they are shown.
constexpr const char* kPhases[] = {"first prefill", "decode", "second prefill"};
using PhaseProfiles = std::map<std::string, PhaseProfile>;

void note(const Engine& engine, const std::vector<std::string>& programs, const PhaseCost& cost, PhaseProfile* out) {
  const auto profiles = engine.profiles();
  if (profiles.empty() || cost.tokens == 0) return;
  out->tokens = cost.tokens;
  const bool timed = profiles.front().second->timestamps();
  (timed ? out->timed_seconds : out->seconds) = cost.seconds;
  double in_programs = 0;
  for (const auto& [name, profile] : profiles) {
    if (std::find(programs.begin(), programs.end(), name) == programs.end()) continue;
    for (const auto& [kernel, kernel_cost] : profile->kernels()) {
      ProfileCost& sum = out->device[kernel];
      sum.calls += kernel_cost.calls;
      sum.seconds += kernel_cost.seconds;
    }
    for (size_t i = 0; i < device::kHostParts && !timed; ++i) {
      const ProfileCost& part = profile->host(static_cast<HostPart>(i));
      ProfileCost& sum = out->host[device::host_part_name(static_cast<HostPart>(i))];
      sum.calls += part.calls;
      sum.seconds += part.seconds;
      in_programs += part.seconds;
    }
  }
  if (!timed) out->host["outside (sampling, copies)"] = {cost.tokens, std::max(cost.seconds - in_programs, 0.0)};
}

void run(const ProfileRequest& request, ProfileMode mode, PhaseProfiles* out) {
  EngineOptions options = request.options;
  options.profile = mode;
  Engine engine(request.artifact, options);
  if (engine.profiles().empty()) throw Error("--profile measures GPUs: give --device vulkan or opencl");
  Session session(engine);
  std::vector<int32_t> prompt(request.prompt_tokens);
  for (size_t i = 0; i < prompt.size(); ++i)
    prompt[i] = static_cast<int32_t>((31 * i + 7) % static_cast<size_t>(engine.model().vocab_size));
  const auto take = [](int32_t) { return true; };
  // The first run of a kernel is slower than all others.
  session.generate(std::span(prompt).first(std::min<size_t>(prompt.size(), 4)), 3, {}, {}, take);
  session.reset();
  engine.reset_profiles();
  session.generate(prompt, 1, {}, {}, take);
  note(engine, {"prefill"}, session.metrics().prefill, &(*out)[kPhases[0]]);
  // What one token decodes, and what follows is decoding alone.
  engine.reset_profiles();
  const PhaseCost before = session.metrics().decode;
  std::vector<int32_t> answer;
  session.generate({prompt.data(), 1}, request.new_tokens + 1, {}, {}, [&](int32_t token) {
    if (answer.empty()) engine.reset_profiles();
    answer.push_back(token);
    return true;
  });
  PhaseCost decode = session.metrics().decode;
  decode.tokens -= before.tokens;
  decode.seconds -= before.seconds;
  note(engine, {"decode", "head"}, decode, &(*out)[kPhases[1]]);
  if (session.position() + prompt.size() > engine.context_size()) return;
  engine.reset_profiles();
  const PhaseCost first = session.metrics().prefill;
  session.feed(prompt, false, nullptr);
  PhaseCost second = session.metrics().prefill;
  second.tokens -= first.tokens;
  second.seconds -= first.seconds;
  note(engine, {"prefill"}, second, &(*out)[kPhases[2]]);
}

std::vector<std::pair<std::string, ProfileCost>> sorted(const std::map<std::string, ProfileCost>& costs) {
  std::vector<std::pair<std::string, ProfileCost>> out(costs.begin(), costs.end());
  std::stable_sort(out.begin(), out.end(),
                   [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  return out;
}

// Per token of the phase; shares are of the undisturbed time for the host, of the device's own time for kernels.
std::string table(const char* title, const std::map<std::string, ProfileCost>& costs, double whole, uint64_t tokens,
                  bool quiet) {
  if (!quiet) std::printf("  %-36s %10s %12s %10s %7s\n", title, "calls/tok", "us/token", "mean us", "share");
  std::string rows;
  for (const auto& [name, cost] : sorted(costs)) {
    const double count = static_cast<double>(tokens), mean = cost.seconds / std::max<double>(cost.calls, 1);
    if (!quiet) {
      std::printf("  %-36s %10.3f %12.3f %10.2f %6.1f%%\n", name.c_str(), static_cast<double>(cost.calls) / count,
                  cost.seconds * 1e6 / count, mean * 1e6, whole > 0 ? 100 * cost.seconds / whole : 0.0);
    }
    JsonObject row;
    row.add("name", name)
        .add("calls", cost.calls)
        .add("microseconds", cost.seconds * 1e6)
        .add("mean_microseconds", mean * 1e6)
        .add("share", whole > 0 ? cost.seconds / whole : 0.0);
    rows += (rows.empty() ? "" : ", ") + row.str();
  }
  return "[" + rows + "]";
}

}  // namespace

JsonObject profile(const ProfileRequest& request, bool quiet) {
  PhaseProfiles phases;
  run(request, ProfileMode::kHost, &phases);
  run(request, ProfileMode::kKernels, &phases);
  JsonObject out;
  for (const char* name : kPhases) {
    const auto found = phases.find(name);
    if (found == phases.end() || found->second.tokens == 0) continue;
    const PhaseProfile& phase = found->second;
    const auto count = static_cast<double>(phase.tokens);
    if (!quiet) {
      std::printf("%s: %llu tokens, %.1f us each (%.1f with timestamps)\n", name,
                  static_cast<unsigned long long>(phase.tokens), phase.seconds * 1e6 / count,
                  phase.timed_seconds * 1e6 / count);
    }
    double busy = 0;
    for (const auto& [kernel, cost] : phase.device) busy += cost.seconds;
    JsonObject part;
    part.add("tokens", phase.tokens)
        .add("seconds", phase.seconds)
        .add("seconds_with_timestamps", phase.timed_seconds)
        .raw("host", table("host", phase.host, phase.seconds, phase.tokens, quiet))
        .raw("device", table("device", phase.device, busy, phase.tokens, quiet));
    out.add(name, part);
  }
  return out;
}

}  // namespace cfmoe::tools
