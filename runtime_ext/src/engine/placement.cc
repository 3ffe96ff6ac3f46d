// Reads the placement options, opens the device and picks the targets.
#include "engine/placement.h"

#include <algorithm>
#include <array>

#include "error.h"

namespace cfmoe {
namespace {

std::string checked(const std::string& option, const std::string& value) {
  for (const char* known : {"cpu", "vulkan", "opencl", "metal"}) {
    if (value == known) return value;
  }
  throw Error(option + " " + value + " is unknown: use cpu, vulkan, opencl or metal" +
              (option == "--device" ? ", or auto" : ""));
}

// The compiler's profiles that suit a device, the best first.
std::array<std::string, 2> profiles(const device::Facts& facts) {
  const auto has = [&facts](const char* word) { return facts.name.find(word) != std::string::npos; };
  const char* best = has("Adreno")                           ? "adreno"
                     : has("Mali")                           ? "mali"
                     : facts.type == device::Type::kDiscrete ? "desktop"
                                                             : "generic";
  return {best, "generic"};
}

TargetEntry pick_gpu_target(const Artifact& artifact, const device::Facts& facts) {
  const std::string kind = device::kind_name(facts.kind);
  const auto wanted = profiles(facts);
  const auto rank = [&](const TargetEntry& target) {
    const auto ends = [&target](const std::string& profile) { return target.name.ends_with("-" + profile); };
    return static_cast<size_t>(std::find_if(wanted.begin(), wanted.end(), ends) - wanted.begin());
  };
  const TargetEntry* best = nullptr;
  std::string reasons;
  for (const TargetEntry& target : artifact.manifest.targets) {
    if (target.device != kind) continue;
    const std::vector<std::string> missing = missing_for(target, facts);
    if (missing.empty()) {
      if (best == nullptr || rank(target) < rank(*best) ||
          (rank(target) == rank(*best) && target.features.size() > best->features.size())) {
        best = &target;
      }
      continue;
    }
    reasons += (reasons.empty() ? "" : "; ") + target.name + " needs ";
    for (size_t i = 0; i < missing.size(); ++i) reasons += (i == 0 ? "" : ", ") + missing[i];
  }
  if (best == nullptr) {
    throw Error(artifact.path_of("manifest.json") + ": no target of this artifact runs on " + facts.name + " through " +
                kind + ": " + (reasons.empty() ? "it has none for " + kind : reasons) +
                "; compile the model with cfmoe compile --target llvm," + kind + ", or use --device cpu");
  }
  check_target_files(artifact, *best);
  return *best;
}

}  // namespace

std::vector<std::string> missing_for(const TargetEntry& target, const device::Facts& facts) {
  std::vector<std::string> missing;
  for (const std::string& feature : target.features) {
    if (std::find(facts.features.begin(), facts.features.end(), feature) == facts.features.end())
      missing.push_back(feature);
  }
  return missing;
}

Placement place(const PlacementOptions& options, const Artifact& artifact) {
  Placement placement;
  const std::string device = checked("--device", options.device);
  const auto phase = [&device](const std::string& option, const std::string& value) {
    return value.empty() ? device : checked(option, value);
  };
  placement.prefill = phase("--prefill-device", options.prefill_device);
  placement.decode = phase("--decode-device", options.decode_device);
  const std::string gpu = placement.prefill != "cpu" ? placement.prefill : placement.decode;
  const std::string phases = "--prefill-device " + placement.prefill + " with --decode-device " + placement.decode;
  if (gpu != "cpu" && placement.decode != "cpu" && placement.decode != gpu)
    throw Error(phases + ": two drivers cannot share one copy of the experts; use one of them, or one with cpu");
  if (gpu != "cpu") {
    const device::Kind kind = gpu == "vulkan"   ? device::Kind::kVulkan
                              : gpu == "opencl" ? device::Kind::kOpenCl
                                                : device::Kind::kMetal;
    placement.device = device::open_device(kind, device::options_from_environment(kind));
    const device::Facts& facts = placement.device->facts();
    if (placement.any_cpu() && !facts.unified) {
      throw Error(phases + ": the CPU does not reach the memory of " + facts.name +
                  " at speed, and there is one copy of the experts; use --device " + gpu + " or --device cpu");
    }
    placement.gpu = pick_gpu_target(artifact, facts);
  }
  if (placement.any_cpu()) placement.cpu = cpu_target(artifact);
  return placement;
}

}  // namespace cfmoe
