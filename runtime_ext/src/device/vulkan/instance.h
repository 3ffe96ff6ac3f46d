// A Vulkan instance, and what its physical devices can do.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "device/device.h"
#include "device/vulkan/api.h"

namespace cfmoe::device {

class VulkanInstance {
 public:
  // With `validate`, the Khronos validation layer watches every call, synchronization included.
  explicit VulkanInstance(bool validate);
  ~VulkanInstance();
  VulkanInstance(const VulkanInstance&) = delete;
  VulkanInstance& operator=(const VulkanInstance&) = delete;

  const VulkanInstanceApi& api() const { return api_; }
  std::vector<VkPhysicalDevice> devices() const;
  // Throws what the validation layer reported since the last call, if anything.
  void check_messages();

 private:
  static VkBool32 on_message(VkDebugUtilsMessageSeverityFlagBitsEXT severity, VkDebugUtilsMessageTypeFlagsEXT types,
                             const VkDebugUtilsMessengerCallbackDataEXT* data, void* user);

  VkInstance instance_ = VK_NULL_HANDLE;
  VkDebugUtilsMessengerEXT messenger_ = VK_NULL_HANDLE;
  VulkanInstanceApi api_;
  std::mutex mutex_;
  std::string messages_;
};

// Everything that we ask a physical device about.
struct PhysicalDevice {
  VkPhysicalDevice handle = VK_NULL_HANDLE;
  Facts facts;
  std::vector<const char*> extensions;  // to enable
  uint32_t queue_family = 0, queue_count = 0;
  uint32_t timestamp_bits = 0;
  float timestamp_period = 1;  // nanoseconds
  bool has_memory_budget = false;
  VkPhysicalDeviceMemoryProperties memory{};
  // Chained for vkCreateDevice: every feature that facts.features names.
  VkPhysicalDeviceFeatures2 features{};
  VkPhysicalDevice16BitStorageFeatures storage16{};
  VkPhysicalDevice8BitStorageFeatures storage8{};
  VkPhysicalDeviceShaderFloat16Int8Features float16_int8{};
  VkPhysicalDeviceShaderIntegerDotProductFeatures dot_product{};
  std::string identity;  // device and driver, for caches

  PhysicalDevice() = default;
  PhysicalDevice(const PhysicalDevice&) = delete;
  PhysicalDevice& operator=(const PhysicalDevice&) = delete;
};

// False where the device is too old (Vulkan 1.1 is needed) or has no queue that computes.
bool inspect(const VulkanInstanceApi& api, VkPhysicalDevice handle, PhysicalDevice* out);

}  // namespace cfmoe::device
