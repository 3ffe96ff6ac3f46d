// Layouts and descriptor sets: how a kernel's buffers reach it.
#include <vector>

#include "device/vulkan/core.h"

namespace cfmoe::device {
namespace {

constexpr uint32_t kSetsPerPool = 256, kBuffersPerSet = 8;

}  // namespace

VulkanLayouts::~VulkanLayouts() {
  for (const auto& [key, layout] : pipelines_) core_.api.vkDestroyPipelineLayout(core_.device, layout, nullptr);
  for (const auto& [key, layout] : sets_) core_.api.vkDestroyDescriptorSetLayout(core_.device, layout, nullptr);
}

VkDescriptorSetLayout VulkanLayouts::set_layout(uint32_t buffers) {
  VkDescriptorSetLayout& layout = sets_[buffers];
  if (layout != VK_NULL_HANDLE) return layout;
  std::vector<VkDescriptorSetLayoutBinding> bindings(buffers);
  for (uint32_t i = 0; i < buffers; ++i)
    bindings[i] = {i, VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, 1, VK_SHADER_STAGE_COMPUTE_BIT, nullptr};
  auto info = vulkan_struct<VkDescriptorSetLayoutCreateInfo>(VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO);
  info.bindingCount = buffers;
  info.pBindings = bindings.data();
  core_.check(core_.api.vkCreateDescriptorSetLayout(core_.device, &info, nullptr, &layout), "loading kernels");
  return layout;
}

VkPipelineLayout VulkanLayouts::pipeline_layout(uint32_t buffers, uint32_t scalars) {
  VkPipelineLayout& layout = pipelines_[{buffers, scalars}];
  if (layout != VK_NULL_HANDLE) return layout;
  const VkDescriptorSetLayout set = set_layout(buffers);
  const VkPushConstantRange range{VK_SHADER_STAGE_COMPUTE_BIT, 0, scalars * 4};
  auto info = vulkan_struct<VkPipelineLayoutCreateInfo>(VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO);
  info.setLayoutCount = 1;
  info.pSetLayouts = &set;
  info.pushConstantRangeCount = scalars > 0 ? 1 : 0;
  info.pPushConstantRanges = &range;
  core_.check(core_.api.vkCreatePipelineLayout(core_.device, &info, nullptr, &layout), "loading kernels");
  return layout;
}

VulkanDescriptors::~VulkanDescriptors() {
  for (VkDescriptorPool pool : pools_) core_.api.vkDestroyDescriptorPool(core_.device, pool, nullptr);
}

VulkanDescriptors::Set VulkanDescriptors::allocate(VkDescriptorSetLayout layout) {
  const std::lock_guard lock(mutex_);
  auto info = vulkan_struct<VkDescriptorSetAllocateInfo>(VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO);
  info.descriptorSetCount = 1;
  info.pSetLayouts = &layout;
  Set set;
  for (auto pool = pools_.rbegin(); pool != pools_.rend(); ++pool) {
    info.descriptorPool = set.pool = *pool;
    if (core_.api.vkAllocateDescriptorSets(core_.device, &info, &set.handle) == VK_SUCCESS) return set;
  }
  const VkDescriptorPoolSize size{VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, kSetsPerPool * kBuffersPerSet};
  auto pool = vulkan_struct<VkDescriptorPoolCreateInfo>(VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO);
  pool.flags = VK_DESCRIPTOR_POOL_CREATE_FREE_DESCRIPTOR_SET_BIT;
  pool.maxSets = kSetsPerPool;
  pool.poolSizeCount = 1;
  pool.pPoolSizes = &size;
  core_.check(core_.api.vkCreateDescriptorPool(core_.device, &pool, nullptr, &set.pool), "binding kernels");
  pools_.push_back(set.pool);
  info.descriptorPool = set.pool;
  core_.check(core_.api.vkAllocateDescriptorSets(core_.device, &info, &set.handle), "binding kernels");
  return set;
}

void VulkanDescriptors::free(const Set& set) {
  const std::lock_guard lock(mutex_);
  core_.api.vkFreeDescriptorSets(core_.device, set.pool, 1, &set.handle);
}

VulkanBindings::VulkanBindings(VulkanCore& core, VulkanDescriptors& descriptors, const VulkanKernel& kernel,
                               std::span<const View> views)
    : Bindings(kernel, views), descriptors_(descriptors), set_(descriptors.allocate(kernel.set_layout)) {
  std::vector<VkDescriptorBufferInfo> buffers;
  for (const View& view : views) buffers.push_back({handle_of(view), view.offset, view.size});
  std::vector<VkWriteDescriptorSet> writes(buffers.size());
  for (size_t i = 0; i < buffers.size(); ++i) {
    writes[i].sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET;
    writes[i].dstSet = set_.handle;
    writes[i].dstBinding = static_cast<uint32_t>(i);
    writes[i].descriptorCount = 1;
    writes[i].descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER;
    writes[i].pBufferInfo = &buffers[i];
  }
  core.api.vkUpdateDescriptorSets(core.device, static_cast<uint32_t>(writes.size()), writes.data(), 0, nullptr);
}

}  // namespace cfmoe::device
