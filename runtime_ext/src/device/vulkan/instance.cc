// Instances, with or without the validation layer, and the facts of physical devices.
#include "device/vulkan/instance.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "error.h"

namespace cfmoe::device {
namespace {

constexpr char kValidationLayer[] = "VK_LAYER_KHRONOS_validation";

bool has_layer(const char* wanted) {
  uint32_t count = 0;
  vulkan_check(vulkan_loader().vkEnumerateInstanceLayerProperties(&count, nullptr), "listing layers");
  std::vector<VkLayerProperties> layers(count);
  vulkan_check(vulkan_loader().vkEnumerateInstanceLayerProperties(&count, layers.data()), "listing layers");
  return std::any_of(layers.begin(), layers.end(),
                     [wanted](const VkLayerProperties& layer) { return std::strcmp(layer.layerName, wanted) == 0; });
}

std::string version_text(uint32_t version) {
  return std::to_string(VK_API_VERSION_MAJOR(version)) + "." + std::to_string(VK_API_VERSION_MINOR(version)) + "." +
         std::to_string(VK_API_VERSION_PATCH(version));
}

Type type_of(VkPhysicalDeviceType type) {
  switch (type) {
    case VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: return Type::kDiscrete;
    case VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: return Type::kIntegrated;
    case VK_PHYSICAL_DEVICE_TYPE_CPU: return Type::kCpu;
    default: return Type::kOther;
  }
}

bool has_mapped_local_memory(const VkPhysicalDeviceMemoryProperties& memory) {
  constexpr VkMemoryPropertyFlags kWanted =
      VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT | VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
  for (uint32_t i = 0; i < memory.memoryTypeCount; ++i) {
    if ((memory.memoryTypes[i].propertyFlags & kWanted) == kWanted) return true;
  }
  return false;
}

}  // namespace

VulkanInstance::VulkanInstance(bool validate) {
  uint32_t version = VK_API_VERSION_1_0;
  vulkan_check(vulkan_loader().vkEnumerateInstanceVersion(&version), "asking for its version");
  VkApplicationInfo application{VK_STRUCTURE_TYPE_APPLICATION_INFO, nullptr, "cfmoe", 0, "cfmoe", 0, 0};
  application.apiVersion = std::min<uint32_t>(version, VK_API_VERSION_1_3);
  auto info = vulkan_struct<VkInstanceCreateInfo>(VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO);
  info.pApplicationInfo = &application;

  const char* layer = kValidationLayer;
  const char* extensions[] = {VK_EXT_DEBUG_UTILS_EXTENSION_NAME, VK_EXT_VALIDATION_FEATURES_EXTENSION_NAME};
  const VkValidationFeatureEnableEXT enabled[] = {VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT};
  auto features = vulkan_struct<VkValidationFeaturesEXT>(VK_STRUCTURE_TYPE_VALIDATION_FEATURES_EXT);
  auto messenger =
      vulkan_struct<VkDebugUtilsMessengerCreateInfoEXT>(VK_STRUCTURE_TYPE_DEBUG_UTILS_MESSENGER_CREATE_INFO_EXT);
  if (validate) {
    if (!has_layer(kValidationLayer)) {
      throw Error(std::string("CFMOE_VULKAN_VALIDATE: ") + kValidationLayer +
                  " is not installed: install vulkan-validationlayers, or unset the variable");
    }
    features.enabledValidationFeatureCount = 1;
    features.pEnabledValidationFeatures = enabled;
    messenger.messageSeverity =
        VK_DEBUG_UTILS_MESSAGE_SEVERITY_WARNING_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_SEVERITY_ERROR_BIT_EXT;
    messenger.messageType =
        VK_DEBUG_UTILS_MESSAGE_TYPE_VALIDATION_BIT_EXT | VK_DEBUG_UTILS_MESSAGE_TYPE_PERFORMANCE_BIT_EXT;
    messenger.pfnUserCallback = &VulkanInstance::on_message;
    messenger.pUserData = this;
    features.pNext = &messenger;
    info.pNext = &features;
    info.enabledLayerCount = 1;
    info.ppEnabledLayerNames = &layer;
    info.enabledExtensionCount = 2;
    info.ppEnabledExtensionNames = extensions;
  }
  vulkan_check(vulkan_loader().vkCreateInstance(&info, nullptr, &instance_), "opening it");
  api_ = vulkan_instance_api(instance_);
  if (validate) {
    const auto create = reinterpret_cast<PFN_vkCreateDebugUtilsMessengerEXT>(
        vulkan_loader().vkGetInstanceProcAddr(instance_, "vkCreateDebugUtilsMessengerEXT"));
    vulkan_check(create(instance_, &messenger, nullptr, &messenger_), "opening the validation layer");
  }
}

VulkanInstance::~VulkanInstance() {
  if (messenger_ != VK_NULL_HANDLE) {
    const auto destroy = reinterpret_cast<PFN_vkDestroyDebugUtilsMessengerEXT>(
        vulkan_loader().vkGetInstanceProcAddr(instance_, "vkDestroyDebugUtilsMessengerEXT"));
    destroy(instance_, messenger_, nullptr);
  }
  api_.vkDestroyInstance(instance_, nullptr);
  // A destructor cannot throw; whoever validates reads this.
  if (!messages_.empty()) std::fprintf(stderr, "Vulkan validation: %s\n", messages_.c_str());
}

VkBool32 VulkanInstance::on_message(VkDebugUtilsMessageSeverityFlagBitsEXT, VkDebugUtilsMessageTypeFlagsEXT,
                                    const VkDebugUtilsMessengerCallbackDataEXT* data, void* user) {
  auto* self = static_cast<VulkanInstance*>(user);
  const std::lock_guard lock(self->mutex_);
  if (self->messages_.size() < 4096)
    self->messages_ += (self->messages_.empty() ? "" : "; ") + std::string(data->pMessage);
  return VK_FALSE;
}

void VulkanInstance::check_messages() {
  const std::lock_guard lock(mutex_);
  if (messages_.empty()) return;
  const std::string messages = std::exchange(messages_, "");
  throw Error(ErrorKind::kInternal, "Vulkan validation: " + messages);
}

std::vector<VkPhysicalDevice> VulkanInstance::devices() const {
  uint32_t count = 0;
  vulkan_check(api_.vkEnumeratePhysicalDevices(instance_, &count, nullptr), "listing devices");
  std::vector<VkPhysicalDevice> devices(count);
  vulkan_check(api_.vkEnumeratePhysicalDevices(instance_, &count, devices.data()), "listing devices");
  devices.resize(count);
  return devices;
}

bool inspect(const VulkanInstanceApi& api, VkPhysicalDevice handle, PhysicalDevice* out) {
  out->handle = handle;
  auto subgroup =
      vulkan_struct<VkPhysicalDeviceSubgroupProperties>(VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES);
  auto maintenance = vulkan_struct<VkPhysicalDeviceMaintenance3Properties>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MAINTENANCE_3_PROPERTIES, &subgroup);
  auto properties =
      vulkan_struct<VkPhysicalDeviceProperties2>(VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, &maintenance);
  api.vkGetPhysicalDeviceProperties2(handle, &properties);
  const VkPhysicalDeviceProperties& core = properties.properties;
  if (core.apiVersion < VK_API_VERSION_1_1) return false;

  uint32_t count = 0;
  vulkan_check(api.vkEnumerateDeviceExtensionProperties(handle, nullptr, &count, nullptr), "listing extensions");
  std::vector<VkExtensionProperties> available(count);
  vulkan_check(api.vkEnumerateDeviceExtensionProperties(handle, nullptr, &count, available.data()),
               "listing extensions");
  const auto listed = [&](const char* name) {
    return std::any_of(available.begin(), available.end(),
                       [name](const VkExtensionProperties& e) { return std::strcmp(e.extensionName, name) == 0; });
  };
  // Whether a structure of `extension`, part of Vulkan since `version`, may be used; enables the extension if need be.
  const auto enable = [&](const char* extension, uint32_t version) {
    if (core.apiVersion >= version) return true;
    if (!listed(extension)) return false;
    out->extensions.push_back(extension);
    return true;
  };
  // A driver over another API (MoltenVK) wants this said.
  if (listed("VK_KHR_portability_subset")) out->extensions.push_back("VK_KHR_portability_subset");
  out->has_memory_budget = listed(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);
  if (out->has_memory_budget) out->extensions.push_back(VK_EXT_MEMORY_BUDGET_EXTENSION_NAME);

  void** next = &out->features.pNext;
  out->features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
  const auto chain = [&next](auto& structure, VkStructureType type) {
    structure.sType = type;
    *next = &structure;
    next = &structure.pNext;
  };
  chain(out->storage16, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES);
  if (enable(VK_KHR_8BIT_STORAGE_EXTENSION_NAME, VK_API_VERSION_1_2))
    chain(out->storage8, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_8BIT_STORAGE_FEATURES);
  if (enable(VK_KHR_SHADER_FLOAT16_INT8_EXTENSION_NAME, VK_API_VERSION_1_2))
    chain(out->float16_int8, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_FLOAT16_INT8_FEATURES);
  if (enable(VK_KHR_SHADER_INTEGER_DOT_PRODUCT_EXTENSION_NAME, VK_API_VERSION_1_3))
    chain(out->dot_product, VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SHADER_INTEGER_DOT_PRODUCT_FEATURES);
  api.vkGetPhysicalDeviceFeatures2(handle, &out->features);

  // Only what kernels use: robust access, for one, costs speed.
  const VkPhysicalDeviceFeatures found = out->features.features;
  out->features.features = {};
  out->features.features.shaderInt16 = found.shaderInt16;
  out->features.features.shaderInt64 = found.shaderInt64;
  Facts& facts = out->facts;
  const auto add = [&facts](bool has, const char* name) {
    if (has) facts.features.emplace_back(name);
  };
  const auto subgroup_can = [&subgroup](VkSubgroupFeatureFlags flags) {
    return (subgroup.supportedStages & VK_SHADER_STAGE_COMPUTE_BIT) != 0 &&
           (subgroup.supportedOperations & flags) == flags;
  };
  add(out->float16_int8.shaderFloat16 != 0, "float16");
  add(out->float16_int8.shaderInt8 != 0, "int8");
  add(out->dot_product.shaderIntegerDotProduct != 0, "integer_dot");
  add(found.shaderInt16 != 0, "int16");
  add(found.shaderInt64 != 0, "int64");
  add(out->storage16.storageBuffer16BitAccess != 0, "storage16");
  add(out->storage8.storageBuffer8BitAccess != 0, "storage8");
  add(subgroup_can(VK_SUBGROUP_FEATURE_BASIC_BIT | VK_SUBGROUP_FEATURE_ARITHMETIC_BIT), "subgroup_arithmetic");
  add(subgroup_can(VK_SUBGROUP_FEATURE_BASIC_BIT | VK_SUBGROUP_FEATURE_SHUFFLE_BIT) && subgroup.subgroupSize >= 4,
      "subgroup_shuffle");
  std::sort(facts.features.begin(), facts.features.end());

  auto memory = vulkan_struct<VkPhysicalDeviceMemoryProperties2>(VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2);
  api.vkGetPhysicalDeviceMemoryProperties2(handle, &memory);
  out->memory = memory.memoryProperties;
  const VkPhysicalDeviceLimits& limits = core.limits;
  facts.kind = Kind::kVulkan;
  facts.type = type_of(core.deviceType);
  facts.name = core.deviceName;
  facts.driver = "Vulkan " + version_text(core.apiVersion) + ", driver version " + std::to_string(core.driverVersion);
  if (core.vendorID == 0x10de) {  // NVIDIA packs its versions in its own way
    facts.driver = "Vulkan " + version_text(core.apiVersion) + ", NVIDIA " + std::to_string(core.driverVersion >> 22) +
                   "." + std::to_string(core.driverVersion >> 14 & 0xff);
  }
  facts.binds_host = true;
  facts.unified = (facts.type == Type::kIntegrated || facts.type == Type::kCpu) && has_mapped_local_memory(out->memory);
  for (uint32_t i = 0; i < out->memory.memoryHeapCount; ++i) {
    if ((out->memory.memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) != 0)
      facts.memory_bytes = std::max<uint64_t>(facts.memory_bytes, out->memory.memoryHeaps[i].size);
  }
  facts.max_buffer_bytes = maintenance.maxMemoryAllocationSize;
  facts.max_binding_bytes = limits.maxStorageBufferRange;
  facts.offset_alignment = limits.minStorageBufferOffsetAlignment;
  facts.max_buffers = std::min(
      {limits.maxPerStageDescriptorStorageBuffers, limits.maxDescriptorSetStorageBuffers, limits.maxPerStageResources});
  facts.max_scalars = limits.maxPushConstantsSize / 4;
  facts.max_group_threads = limits.maxComputeWorkGroupInvocations;
  for (size_t i = 0; i < 3; ++i) {
    facts.max_group[i] = limits.maxComputeWorkGroupSize[i];
    facts.max_groups[i] = limits.maxComputeWorkGroupCount[i];
  }
  out->timestamp_period = limits.timestampPeriod;
  out->identity = facts.name + "\n" + facts.driver + "\n" +
                  std::string(reinterpret_cast<const char*>(core.pipelineCacheUUID), VK_UUID_SIZE);

  api.vkGetPhysicalDeviceQueueFamilyProperties(handle, &count, nullptr);
  std::vector<VkQueueFamilyProperties> families(count);
  api.vkGetPhysicalDeviceQueueFamilyProperties(handle, &count, families.data());
  for (uint32_t i = 0; i < count; ++i) {
    if ((families[i].queueFlags & VK_QUEUE_COMPUTE_BIT) == 0 || families[i].queueCount == 0) continue;
    out->queue_family = i;
    out->queue_count = families[i].queueCount;
    out->timestamp_bits = families[i].timestampValidBits;
    return true;
  }
  return false;
}

}  // namespace cfmoe::device
