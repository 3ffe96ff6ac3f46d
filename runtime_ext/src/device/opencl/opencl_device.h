// OpenCL devices: see device.h.
#pragma once

#include <memory>
#include <vector>

#include "device/device.h"

namespace cfmoe::device {

std::unique_ptr<Device> open_opencl(const OpenOptions& options);
std::vector<Facts> list_opencl();

}  // namespace cfmoe::device
