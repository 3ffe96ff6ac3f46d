// Which phase runs where: the devices that were asked for, opened, and the targets of the artifact for them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "artifact/artifact_files.h"
#include "device/device.h"

namespace cfmoe {

struct PlacementOptions {
  std::string device = "cpu";                 // cpu, vulkan, opencl; auto is for open_engine
  std::string prefill_device, decode_device;  // "": as `device`
};

struct Placement {
  std::string prefill = "cpu", decode = "cpu";  // cpu, vulkan, opencl
  std::optional<TargetEntry> cpu, gpu;          // targets of the artifact, where a phase needs one
  std::unique_ptr<device::Device> device;       // null where both phases run on the CPU

  bool any_cpu() const { return prefill == "cpu" || decode == "cpu"; }
};

// Throws cfmoe::Error where an option is unknown, the artifact has no target that runs there, the device is missing, or
// two phases cannot share one copy of the experts.
Placement place(const PlacementOptions& options, const Artifact& artifact);

// What `target` needs and a device lacks.
std::vector<std::string> missing_for(const TargetEntry& target, const device::Facts& facts);

}  // namespace cfmoe
