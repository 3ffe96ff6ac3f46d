// The Vulkan functions that we call, taken from the loader while the program runs.
#pragma once

#define VK_NO_PROTOTYPES
#include <vulkan/vulkan_core.h>

#include <string>

namespace cfmoe::device {

// The formatter never agrees with itself about these lists.
// clang-format off
#define CFMOE_VULKAN_GLOBAL(F) \
  F(vkCreateInstance) F(vkEnumerateInstanceVersion) F(vkEnumerateInstanceLayerProperties)

#define CFMOE_VULKAN_INSTANCE(F) \
  F(vkDestroyInstance) F(vkEnumeratePhysicalDevices) F(vkGetPhysicalDeviceProperties2) \
  F(vkGetPhysicalDeviceFeatures2) F(vkGetPhysicalDeviceMemoryProperties2) \
  F(vkGetPhysicalDeviceQueueFamilyProperties) F(vkEnumerateDeviceExtensionProperties) F(vkCreateDevice) \
  F(vkGetDeviceProcAddr)

#define CFMOE_VULKAN_DEVICE(F) \
  F(vkDestroyDevice) F(vkGetDeviceQueue) F(vkDeviceWaitIdle) F(vkAllocateMemory) F(vkFreeMemory) F(vkMapMemory) \
  F(vkCreateBuffer) F(vkDestroyBuffer) F(vkGetBufferMemoryRequirements) F(vkBindBufferMemory) \
  F(vkCreateShaderModule) F(vkDestroyShaderModule) F(vkCreatePipelineCache) F(vkDestroyPipelineCache) \
  F(vkGetPipelineCacheData) F(vkCreateComputePipelines) F(vkDestroyPipeline) F(vkCreateDescriptorSetLayout) \
  F(vkDestroyDescriptorSetLayout) F(vkCreatePipelineLayout) F(vkDestroyPipelineLayout) \
  F(vkCreateDescriptorPool) F(vkDestroyDescriptorPool) F(vkAllocateDescriptorSets) F(vkFreeDescriptorSets) \
  F(vkUpdateDescriptorSets) F(vkCreateCommandPool) F(vkDestroyCommandPool) F(vkAllocateCommandBuffers) \
  F(vkBeginCommandBuffer) F(vkEndCommandBuffer) F(vkResetCommandBuffer) F(vkQueueSubmit) F(vkCreateFence) \
  F(vkDestroyFence) F(vkWaitForFences) F(vkGetFenceStatus) F(vkResetFences) F(vkCmdBindPipeline) \
  F(vkCmdBindDescriptorSets) F(vkCmdPushConstants) F(vkCmdDispatch) F(vkCmdCopyBuffer) F(vkCmdFillBuffer) \
  F(vkCmdPipelineBarrier) F(vkCreateQueryPool) F(vkDestroyQueryPool) F(vkGetQueryPoolResults) \
  F(vkCmdResetQueryPool) F(vkCmdWriteTimestamp)
// clang-format on

#define CFMOE_VULKAN_DECLARE(name) PFN_##name name = nullptr;
struct VulkanGlobal {
  PFN_vkGetInstanceProcAddr vkGetInstanceProcAddr = nullptr;
  CFMOE_VULKAN_GLOBAL(CFMOE_VULKAN_DECLARE)
};
struct VulkanInstanceApi {
  CFMOE_VULKAN_INSTANCE(CFMOE_VULKAN_DECLARE)
};
struct VulkanDeviceApi {
  CFMOE_VULKAN_DEVICE(CFMOE_VULKAN_DECLARE)
};
#undef CFMOE_VULKAN_DECLARE

// Opens the loader once. Throws cfmoe::Error where there is none.
const VulkanGlobal& vulkan_loader();
VulkanInstanceApi vulkan_instance_api(VkInstance instance);
VulkanDeviceApi vulkan_device_api(const VulkanInstanceApi& api, VkDevice device);

// A structure of Vulkan's, zeros but for its type and what follows in its chain.
template <typename T>
T vulkan_struct(VkStructureType type, void* next = nullptr) {
  T out{};
  out.sType = type;
  out.pNext = next;
  return out;
}

// Throws cfmoe::Error for what is no success, in words that say what to do.
void vulkan_check(VkResult result, const std::string& doing);

}  // namespace cfmoe::device
