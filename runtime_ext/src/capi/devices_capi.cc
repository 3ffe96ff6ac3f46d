// The C API's questions about devices.
#include <algorithm>
#include <cstring>
#include <string>

#include "capi/guard.h"
#include "cfmoe/cfmoe.h"
#include "device/device.h"
#include "error.h"

namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out + '"';
}

std::string json_of(const cfmoe::device::Facts& facts, size_t index) {
  std::string features;
  for (const std::string& feature : facts.features) features += (features.empty() ? "" : ", ") + quoted(feature);
  return "{\"index\": " + std::to_string(index) + ", \"name\": " + quoted(facts.name) +
         ", \"type\": " + quoted(cfmoe::device::type_name(facts.type)) + ", \"driver\": " + quoted(facts.driver) +
         ", \"features\": [" + features + "], \"unified\": " + (facts.unified ? "true" : "false") +
         ", \"memory_bytes\": " + std::to_string(facts.memory_bytes) + "}";
}

}  // namespace

cfmoe_status cfmoe_devices(const char* kind, char* out, size_t capacity, size_t* size, char* error, size_t error_size) {
  return cfmoe::capi::guarded(error, error_size, [&] {
    cfmoe::capi::require(kind != nullptr && size != nullptr, "kind or size is NULL");
    const std::string name = kind;
    if (name != "vulkan" && name != "opencl" && name != "metal")
      throw cfmoe::Error("kind " + name + " is unknown: use vulkan, opencl or metal");
    std::string text = "[";
    size_t index = 0;
    const auto of = name == "vulkan"   ? cfmoe::device::Kind::kVulkan
                    : name == "opencl" ? cfmoe::device::Kind::kOpenCl
                                       : cfmoe::device::Kind::kMetal;
    for (const cfmoe::device::Facts& facts : cfmoe::device::list_devices(of)) {
      text += (index == 0 ? "" : ", ") + json_of(facts, index);
      ++index;
    }
    text += "]";
    *size = text.size();
    if (out != nullptr && text.size() < capacity) std::memcpy(out, text.c_str(), text.size() + 1);
  });
}
