// What all kinds of devices share: names, choice, checks.
#include "device/device.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "device/opencl/opencl_device.h"
#include "device/vulkan/vulkan_device.h"
#include "error.h"

namespace cfmoe::device {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

const char* choice_variable(Kind kind) {
  switch (kind) {
    case Kind::kVulkan: return "CFMOE_VULKAN_DEVICE";
    case Kind::kOpenCl: return "CFMOE_OPENCL_DEVICE";
    case Kind::kMetal: break;
  }
  return "CFMOE_METAL_DEVICE";
}

const char* driver_hint(Kind kind) {
  switch (kind) {
    case Kind::kVulkan: return "install the driver of your GPU (or mesa-vulkan-drivers for a software device)";
    case Kind::kOpenCl: return "install the driver of your GPU (or pocl-opencl-icd for a software device)";
    case Kind::kMetal: break;
  }
  return "Metal needs a GPU of Apple's";
}

// In a function, for registration may come before this file's own statics.
std::array<Backend, 3>& backends() {
  static std::array<Backend, 3> all = {Backend{open_vulkan, list_vulkan}, Backend{open_opencl, list_opencl}, Backend{}};
  return all;
}

const Backend& backend_of(Kind kind) {
  const Backend& backend = backends()[static_cast<size_t>(kind)];
  if (backend.open == nullptr)
    throw Error(std::string("this build has no ") + kind_name(kind) + ": use --device cpu, vulkan or opencl");
  return backend;
}

}  // namespace

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::kVulkan: return "vulkan";
    case Kind::kOpenCl: return "opencl";
    case Kind::kMetal: break;
  }
  return "metal";
}

const char* type_name(Type type) {
  switch (type) {
    case Type::kDiscrete: return "discrete";
    case Type::kIntegrated: return "integrated";
    case Type::kCpu: return "cpu";
    case Type::kOther: break;
  }
  return "other";
}

Bindings::Bindings(const Kernel& kernel, std::span<const View> views) : kernel_(kernel) {
  if (views.size() != kernel.code().buffers) {
    throw Error(ErrorKind::kInternal, "kernel " + kernel.code().name + " takes " +
                                          std::to_string(kernel.code().buffers) + " buffers, not " +
                                          std::to_string(views.size()));
  }
  for (const View& view : views) uses_.push_back({view, false});
  for (const uint32_t index : kernel.code().writes) uses_.at(index).write = true;
}

void check_kernel(const Facts& facts, const KernelCode& kernel, uint64_t library_bytes) {
  const auto fail = [&](const std::string& reason) {
    throw Error("kernel " + kernel.name + " " + reason + " (" + facts.name +
                "): compile the artifact for another profile of this device, or use --device cpu");
  };
  if (kernel.offset > library_bytes || kernel.bytes > library_bytes - kernel.offset) fail("lies outside its library");
  uint64_t threads = 1;
  for (size_t i = 0; i < 3; ++i) {
    if (kernel.local[i] == 0 || kernel.local[i] > facts.max_group[i]) {
      fail("has workgroups of " + std::to_string(kernel.local[i]) + ", the device's limit is " +
           std::to_string(facts.max_group[i]));
    }
    threads *= kernel.local[i];
  }
  if (threads > facts.max_group_threads) {
    fail("has workgroups of " + std::to_string(threads) + " threads, the device's limit is " +
         std::to_string(facts.max_group_threads));
  }
  if (kernel.buffers > facts.max_buffers) fail("binds " + std::to_string(kernel.buffers) + " buffers, too many");
  if (kernel.scalars > facts.max_scalars) fail("takes " + std::to_string(kernel.scalars) + " scalars, too many");
}

OpenOptions options_from_environment(Kind kind) {
  OpenOptions options;
  options.device = environment(choice_variable(kind));
  options.separate = environment("CFMOE_DEVICE_MEMORY") == "separate";
  options.validate = environment("CFMOE_VULKAN_VALIDATE") == "1";
  return options;
}

size_t choose_device(Kind kind, std::span<const Facts> devices, const std::string& wanted) {
  std::string all;
  for (size_t i = 0; i < devices.size(); ++i) {
    all += (i == 0 ? "" : ", ") + std::to_string(i) + " " + devices[i].name;
  }
  if (!wanted.empty()) {
    size_t index = 0;
    const auto [end, error] = std::from_chars(wanted.data(), wanted.data() + wanted.size(), index);
    const bool number = error == std::errc() && end == wanted.data() + wanted.size();
    if (number && index < devices.size()) return index;
    for (size_t i = 0; !number && i < devices.size(); ++i) {
      if (devices[i].name.find(wanted) != std::string::npos) return i;
    }
    throw Error(std::string(choice_variable(kind)) + " " + wanted + " names no " + kind_name(kind) +
                " device: choose one of " + all);
  }
  if (devices.empty()) {
    throw Error(std::string("no ") + kind_name(kind) + " device is usable here: " + driver_hint(kind) +
                ", or use --device cpu");
  }
  const auto best =
      std::min_element(devices.begin(), devices.end(), [](const Facts& a, const Facts& b) { return a.type < b.type; });
  return static_cast<size_t>(best - devices.begin());
}

void register_backend(Kind kind, const Backend& backend) { backends()[static_cast<size_t>(kind)] = backend; }

std::unique_ptr<Device> open_device(Kind kind, const OpenOptions& options) { return backend_of(kind).open(options); }

std::vector<Facts> list_devices(Kind kind) { return backend_of(kind).list(); }

}  // namespace cfmoe::device
