// Looks Vulkan's functions up, and says in words what its results mean.
#include "device/vulkan/api.h"

#include "device/shared_library.h"
#include "error.h"

namespace cfmoe::device {

const VulkanGlobal& vulkan_loader() {
  static const VulkanGlobal global = [] {
    static const SharedLibrary library({"libvulkan.so.1", "libvulkan.so", "libvulkan.1.dylib", "libMoltenVK.dylib"});
    if (!library.is_open()) {
      throw Error("Vulkan's loader is not installed (" + library.reason() +
                  "): install libvulkan1 and the driver of your GPU, or use --device cpu");
    }
    VulkanGlobal out;
    out.vkGetInstanceProcAddr = reinterpret_cast<PFN_vkGetInstanceProcAddr>(library.symbol("vkGetInstanceProcAddr"));
    const auto load = [&out](const char* name) { return out.vkGetInstanceProcAddr(nullptr, name); };
    if (out.vkGetInstanceProcAddr != nullptr) {
#define CFMOE_VULKAN_LOAD(name) out.name = reinterpret_cast<PFN_##name>(load(#name));
      CFMOE_VULKAN_GLOBAL(CFMOE_VULKAN_LOAD)
#undef CFMOE_VULKAN_LOAD
    }
    if (out.vkCreateInstance == nullptr || out.vkEnumerateInstanceVersion == nullptr)
      throw Error("Vulkan's loader is too old, 1.1 is needed: update it, or use --device cpu");
    return out;
  }();
  return global;
}

VulkanInstanceApi vulkan_instance_api(VkInstance instance) {
  VulkanInstanceApi api;
#define CFMOE_VULKAN_LOAD(name) \
  api.name = reinterpret_cast<PFN_##name>(vulkan_loader().vkGetInstanceProcAddr(instance, #name));
  CFMOE_VULKAN_INSTANCE(CFMOE_VULKAN_LOAD)
#undef CFMOE_VULKAN_LOAD
  return api;
}

VulkanDeviceApi vulkan_device_api(const VulkanInstanceApi& instance, VkDevice device) {
  VulkanDeviceApi api;
#define CFMOE_VULKAN_LOAD(name) api.name = reinterpret_cast<PFN_##name>(instance.vkGetDeviceProcAddr(device, #name));
  CFMOE_VULKAN_DEVICE(CFMOE_VULKAN_LOAD)
#undef CFMOE_VULKAN_LOAD
  return api;
}

void vulkan_check(VkResult result, const std::string& doing) {
  switch (result) {
    case VK_SUCCESS:
    case VK_INCOMPLETE: return;
    case VK_ERROR_OUT_OF_DEVICE_MEMORY:
    case VK_ERROR_OUT_OF_HOST_MEMORY:
      throw Error("Vulkan: out of device memory while " + doing +
                  ": use a smaller --memory-budget or --context-size, or --device cpu");
    case VK_ERROR_DEVICE_LOST:
      throw Error(ErrorKind::kInternal, "Vulkan: the device was lost while " + doing +
                                            " (its driver failed, or work took longer than the system allows): run "
                                            "again, update the driver, or use --device cpu");
    case VK_ERROR_INITIALIZATION_FAILED:
    case VK_ERROR_INCOMPATIBLE_DRIVER:
      throw Error(
          "Vulkan: no driver works (while " + doing +
          "): install the driver of your GPU (or mesa-vulkan-drivers for a software device), or use --device cpu");
    default:
      throw Error("Vulkan: error " + std::to_string(result) + " while " + doing +
                  ": update the driver, or use --device cpu");
  }
}

}  // namespace cfmoe::device
