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
  uint64_t tokens = 0, misses = 0;
  double seconds = 0, timed_seconds = 0;  // undisturbed, and with timestamps
  std::map<std::string, ProfileCost> host, device;

  // Before it is measured anew.
  PhaseProfile without(ProfileMode mode) const {
    PhaseProfile out = *this;
    (mode == ProfileMode::kHost ? out.host : out.device).clear();
    return out;
  }
};

// In the order in which they are shown.
constexpr const char* kPhases[] = {"first prefill", "decode", "resident prefill", "resident decode"};
constexpr int kMostRepeats = 8;
using PhaseProfiles = std::map<std::string, PhaseProfile>;

// What a phase has cost until now.
struct Costs {
  PhaseCost cost;
  uint64_t misses = 0;
  double reads = 0;  // seconds of waiting for them

  Costs(const Session& session, Phase phase)
      : cost(phase == Phase::kPrefill ? session.metrics().prefill : session.metrics().decode) {
    const PhaseMetrics metrics = session.engine().cache_metrics(phase);
    misses = metrics.misses;
    reads = static_cast<double>(metrics.stall_ns) * 1e-9;
  }
  void since(const Costs& before) {
    cost.tokens -= before.cost.tokens;
    cost.seconds -= before.cost.seconds;
    misses -= before.misses;
    reads -= before.reads;
  }
};

void note(const Engine& engine, const std::vector<std::string>& programs, const Costs& costs, PhaseProfile* out) {
  const PhaseCost& cost = costs.cost;
  const auto profiles = engine.profiles();
  if (profiles.empty() || cost.tokens == 0) return;
  out->tokens = cost.tokens;
  const bool timed = profiles.front().second->timestamps();
  out->misses = costs.misses;
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
  if (timed) return;
  ProfileCost& experts = out->host[device::host_part_name(HostPart::kExperts)];
  const double reads = std::min(costs.reads, experts.seconds);
  experts.seconds -= reads;
  out->host["reads"] = {costs.misses, reads};
  out->host["outside (sampling, copies)"] = {cost.tokens, std::max(cost.seconds - in_programs, 0.0)};
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
  const auto measure = [&](const char* name, Phase phase, const std::vector<std::string>& programs, const auto& work) {
    const Costs before(session, phase);
    engine.reset_profiles();
    work();
    Costs costs(session, phase);
    costs.since(before);
    (*out)[name] = PhaseProfile((*out)[name]).without(mode);
    note(engine, programs, costs, &(*out)[name]);
    return costs.misses;
  };
  // A token of the answer is decoded once the next is asked for.
  const auto answer = [&] { session.generate({prompt.data(), 1}, request.new_tokens + 1, {}, {}, take); };
  measure(kPhases[0], Phase::kPrefill, {"prefill"}, [&] { session.generate(prompt, 1, {}, {}, take); });
  measure(kPhases[1], Phase::kDecode, {"decode"}, answer);
  uint64_t misses = 1;
  const uint64_t room = engine.context_size();
  for (int i = 0; i < kMostRepeats && misses > 0 && session.position() + prompt.size() <= room; ++i)
    misses = measure(kPhases[2], Phase::kPrefill, {"prefill"}, [&] { session.feed(prompt, false, nullptr); });
  if (session.position() + request.new_tokens + 1 < room) measure(kPhases[3], Phase::kDecode, {"decode"}, answer);
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
      std::printf("%s: %llu tokens, %llu misses, %.1f us each (%.1f with timestamps)\n", name,
                  static_cast<unsigned long long>(phase.tokens), static_cast<unsigned long long>(phase.misses),
                  phase.seconds * 1e6 / count, phase.timed_seconds * 1e6 / count);
    }
    double busy = 0;
    for (const auto& [kernel, cost] : phase.device) busy += cost.seconds;
    JsonObject part;
    part.add("tokens", phase.tokens)
        .add("misses", phase.misses)
        .add("seconds", phase.seconds)
        .add("seconds_with_timestamps", phase.timed_seconds)
        .raw("host", table("host", phase.host, phase.seconds, phase.tokens, quiet))
        .raw("device", table("device", phase.device, busy, phase.tokens, quiet));
    out.add(name, part);
  }
  return out;
}

}  // namespace cfmoe::tools
