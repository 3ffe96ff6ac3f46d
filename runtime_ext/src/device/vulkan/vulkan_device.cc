// A Vulkan device: choosing and opening it, its memory and its kernels.
#include "device/vulkan/vulkan_device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "artifact/checksum.h"
#include "device/kernel_cache.h"
#include "device/vulkan/core.h"
#include "error.h"

namespace cfmoe::device {
namespace {

constexpr uint64_t kDataAlignment = 16384;
constexpr uint32_t kSpirvMagic = 0x07230203;

std::vector<std::unique_ptr<PhysicalDevice>> inspect_all(const VulkanInstance& instance) {
  std::vector<std::unique_ptr<PhysicalDevice>> out;
  for (VkPhysicalDevice handle : instance.devices()) {
    auto device = std::make_unique<PhysicalDevice>();
    if (inspect(instance.api(), handle, device.get())) out.push_back(std::move(device));
  }
  return out;
}

std::vector<Facts> facts_of(const std::vector<std::unique_ptr<PhysicalDevice>>& devices) {
  std::vector<Facts> facts;
  for (const auto& device : devices) facts.push_back(device->facts);
  return facts;
}

class VulkanDevice final : public Device {
 public:
  explicit VulkanDevice(const OpenOptions& options) : separate_(options.separate) {
    core_.instance = std::make_unique<VulkanInstance>(options.validate);
    auto devices = inspect_all(*core_.instance);
    core_.physical = std::move(devices[choose_device(Kind::kVulkan, facts_of(devices), options.device)]);
    if (separate_) core_.physical->facts.unified = false;
    facts_ = core_.physical->facts;
    create();
  }
  ~VulkanDevice() override {
    descriptors_.reset();
    layouts_.reset();
    core_.api.vkDestroyDevice(core_.device, nullptr);
  }

  uint64_t available_memory() const override;
  std::unique_ptr<Buffer> allocate(uint64_t size, Memory memory) override {
    return std::make_unique<VulkanBuffer>(core_, size, memory, separate_);
  }
  std::vector<std::unique_ptr<Kernel>> load(std::string_view library, std::span<const KernelCode> kernels,
                                            uint64_t key) override;
  std::unique_ptr<Bindings> bind(const Kernel& kernel, std::span<const View> views) override {
    for (const View& view : views) check_view(kernel, view);
    return std::make_unique<VulkanBindings>(core_, *descriptors_, static_cast<const VulkanKernel&>(kernel), views);
  }
  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<VulkanStream>(core_, streams_++ % core_.queue_count);
  }

 private:
  void create();
  void check_view(const Kernel& kernel, const View& view) const;
  VkPipeline compile(const KernelCode& code, std::string_view library, VkPipelineLayout layout, VkPipelineCache cache);

  bool separate_;
  VulkanCore core_;
  std::unique_ptr<VulkanLayouts> layouts_;
  std::unique_ptr<VulkanDescriptors> descriptors_;
  std::atomic<uint32_t> streams_{0};
};

void VulkanDevice::create() {
  PhysicalDevice& physical = *core_.physical;
  core_.queue_count = std::min<uint32_t>(physical.queue_count, static_cast<uint32_t>(core_.queues.size()));
  const float priorities[] = {1.0F, 0.5F};
  auto queue = vulkan_struct<VkDeviceQueueCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO);
  queue.queueFamilyIndex = physical.queue_family;
  queue.queueCount = core_.queue_count;
  queue.pQueuePriorities = priorities;
  auto info = vulkan_struct<VkDeviceCreateInfo>(VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO);
  info.pNext = &physical.features;
  info.queueCreateInfoCount = 1;
  info.pQueueCreateInfos = &queue;
  info.enabledExtensionCount = static_cast<uint32_t>(physical.extensions.size());
  info.ppEnabledExtensionNames = physical.extensions.data();
  core_.check(core_.instance->api().vkCreateDevice(physical.handle, &info, nullptr, &core_.device),
              "opening the device");
  core_.api = vulkan_device_api(core_.instance->api(), core_.device);
  for (uint32_t i = 0; i < core_.queue_count; ++i)
    core_.api.vkGetDeviceQueue(core_.device, physical.queue_family, i, &core_.queues[i].handle);
  layouts_ = std::make_unique<VulkanLayouts>(core_);
  descriptors_ = std::make_unique<VulkanDescriptors>(core_);
}

uint64_t VulkanDevice::available_memory() const {
  if (!core_.physical->has_memory_budget) return facts_.memory_bytes;
  auto budget = vulkan_struct<VkPhysicalDeviceMemoryBudgetPropertiesEXT>(
      VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_BUDGET_PROPERTIES_EXT);
  auto memory =
      vulkan_struct<VkPhysicalDeviceMemoryProperties2>(VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_MEMORY_PROPERTIES_2, &budget);
  core_.instance->api().vkGetPhysicalDeviceMemoryProperties2(core_.physical->handle, &memory);
  uint64_t available = 0;
  for (uint32_t i = 0; i < memory.memoryProperties.memoryHeapCount; ++i) {
    if ((memory.memoryProperties.memoryHeaps[i].flags & VK_MEMORY_HEAP_DEVICE_LOCAL_BIT) == 0) continue;
    const uint64_t left = budget.heapBudget[i] - std::min(budget.heapBudget[i], budget.heapUsage[i]);
    available = std::max(available, left);
  }
  return available;
}

void VulkanDevice::check_view(const Kernel& kernel, const View& view) const {
  if (view.size > facts_.max_binding_bytes) {
    throw Error("kernel " + kernel.code().name + " needs " + std::to_string(view.size) +
                " bytes in one piece, the device binds at most " + std::to_string(facts_.max_binding_bytes) + " (" +
                facts_.name + "): use a smaller --context-size or --device cpu");
  }
  if (view.offset % facts_.offset_alignment != 0 || view.size == 0 || view.offset + view.size > view.buffer->size())
    throw Error(ErrorKind::kInternal, "kernel " + kernel.code().name + ": a buffer is not where one can be bound");
}

VkPipeline VulkanDevice::compile(const KernelCode& code, std::string_view library, VkPipelineLayout layout,
                                 VkPipelineCache cache) {
  const std::string_view text = library.substr(code.offset, code.bytes);
  // Drivers want words, and the library's place in memory is no promise of alignment.
  std::vector<uint32_t> words(text.size() / 4);
  std::memcpy(words.data(), text.data(), words.size() * 4);
  if (code.offset % 4 != 0 || text.size() % 4 != 0 || words.size() < 5 || words[0] != kSpirvMagic)
    throw Error("kernel " + code.name + " is no SPIR-V: compile the artifact again");
  auto info = vulkan_struct<VkShaderModuleCreateInfo>(VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO);
  info.codeSize = words.size() * 4;
  info.pCode = words.data();
  VkShaderModule module = VK_NULL_HANDLE;
  core_.check(core_.api.vkCreateShaderModule(core_.device, &info, nullptr, &module), "loading kernel " + code.name);
  auto pipeline = vulkan_struct<VkComputePipelineCreateInfo>(VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO);
  pipeline.stage.sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO;
  pipeline.stage.stage = VK_SHADER_STAGE_COMPUTE_BIT;
  pipeline.stage.module = module;
  pipeline.stage.pName = code.entry.c_str();
  pipeline.layout = layout;
  VkPipeline out = VK_NULL_HANDLE;
  const VkResult result = core_.api.vkCreateComputePipelines(core_.device, cache, 1, &pipeline, nullptr, &out);
  core_.api.vkDestroyShaderModule(core_.device, module, nullptr);
  core_.check(result, "compiling kernel " + code.name);
  return out;
}

std::vector<std::unique_ptr<Kernel>> VulkanDevice::load(std::string_view library, std::span<const KernelCode> kernels,
                                                        uint64_t key) {
  const KernelCache file("vulkan", core_.physical->identity + format_digest(key));
  const std::string stored = file.load();
  auto info = vulkan_struct<VkPipelineCacheCreateInfo>(VK_STRUCTURE_TYPE_PIPELINE_CACHE_CREATE_INFO);
  info.initialDataSize = stored.size();
  info.pInitialData = stored.data();
  VkPipelineCache cache = VK_NULL_HANDLE;
  core_.check(core_.api.vkCreatePipelineCache(core_.device, &info, nullptr, &cache), "loading kernels");
  const auto destroy = [this](VkPipelineCache c) { core_.api.vkDestroyPipelineCache(core_.device, c, nullptr); };
  const std::unique_ptr<VkPipelineCache_T, decltype(destroy)> owner(cache, destroy);

  std::vector<std::unique_ptr<Kernel>> out;
  for (const KernelCode& code : kernels) {
    check_kernel(facts_, code, library.size());
    auto kernel = std::make_unique<VulkanKernel>(core_, code);
    kernel->set_layout = layouts_->set_layout(code.buffers);
    kernel->layout = layouts_->pipeline_layout(code.buffers, code.scalars);
    kernel->pipeline = compile(code, library, kernel->layout, cache);
    out.push_back(std::move(kernel));
  }
  size_t size = 0;
  core_.check(core_.api.vkGetPipelineCacheData(core_.device, cache, &size, nullptr), "keeping compiled kernels");
  std::string bytes(size, '\0');
  core_.check(core_.api.vkGetPipelineCacheData(core_.device, cache, &size, bytes.data()), "keeping compiled kernels");
  bytes.resize(size);
  if (bytes != stored) file.store(bytes);
  core_.instance->check_messages();
  return out;
}

}  // namespace

VulkanBuffer::VulkanBuffer(VulkanCore& core, uint64_t size, Memory memory, bool separate) : core_(core) {
  try {
    create(size, memory, separate);
  } catch (...) {
    destroy();
    throw;
  }
}

VulkanBuffer::~VulkanBuffer() { destroy(); }

void VulkanBuffer::destroy() {
  core_.api.vkDestroyBuffer(core_.device, handle_, nullptr);
  core_.api.vkFreeMemory(core_.device, memory_, nullptr);
}

void VulkanBuffer::create(uint64_t size, Memory memory, bool separate) {
  const std::string doing = "reserving " + std::to_string(size) + " bytes";
  auto info = vulkan_struct<VkBufferCreateInfo>(VK_STRUCTURE_TYPE_BUFFER_CREATE_INFO);
  info.size = size;
  info.usage = VK_BUFFER_USAGE_STORAGE_BUFFER_BIT | VK_BUFFER_USAGE_TRANSFER_SRC_BIT | VK_BUFFER_USAGE_TRANSFER_DST_BIT;
  core_.check(core_.api.vkCreateBuffer(core_.device, &info, nullptr, &handle_), doing);
  VkMemoryRequirements wanted;
  core_.api.vkGetBufferMemoryRequirements(core_.device, handle_, &wanted);

  // Best first. Memory that is not coherent would want flushes around every access.
  constexpr VkMemoryPropertyFlags kLocal = VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT;
  constexpr VkMemoryPropertyFlags kMapped = VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | VK_MEMORY_PROPERTY_HOST_COHERENT_BIT;
  constexpr VkMemoryPropertyFlags kCached = VK_MEMORY_PROPERTY_HOST_CACHED_BIT;
  struct Choice {
    VkMemoryPropertyFlags with, without;
  };
  std::vector<Choice> choices = {{kMapped | kCached, 0}, {kMapped, 0}};
  const bool mapped = memory != Memory::kModel || core_.physical->facts.unified;
  if (!mapped) {
    choices = {{kLocal, kMapped}, {kLocal, 0}};
  } else if (memory != Memory::kHost) {
    choices = {{kLocal | kMapped | kCached, 0}, {kLocal | kMapped, 0}};
    // Not every discrete device lets the host into its memory.
    if (memory == Memory::kUpload) choices.push_back({kMapped, 0});
  } else if (!separate && core_.physical->facts.type == Type::kDiscrete) {
    choices.insert(choices.begin(), {kMapped | kCached, kLocal});
  }
  const VkPhysicalDeviceMemoryProperties& types = core_.physical->memory;
  uint32_t type = types.memoryTypeCount;
  for (const Choice& choice : choices) {
    for (uint32_t i = 0; i < types.memoryTypeCount && type == types.memoryTypeCount; ++i) {
      const VkMemoryPropertyFlags flags = types.memoryTypes[i].propertyFlags;
      if ((wanted.memoryTypeBits >> i & 1) != 0 && (flags & choice.with) == choice.with &&
          ((flags & choice.without) != choice.without || choice.without == 0)) {
        type = i;
      }
    }
  }
  if (type == types.memoryTypeCount) {
    throw Error("Vulkan: " + core_.physical->facts.name +
                " has no memory of the kind that is needed: update the driver, or use --device cpu");
  }
  auto allocation = vulkan_struct<VkMemoryAllocateInfo>(VK_STRUCTURE_TYPE_MEMORY_ALLOCATE_INFO);
  allocation.allocationSize = wanted.size + (mapped ? kDataAlignment : 0);
  allocation.memoryTypeIndex = type;
  core_.check(core_.api.vkAllocateMemory(core_.device, &allocation, nullptr, &memory_), doing);
  uint64_t place = 0;
  if (mapped) {
    void* address = nullptr;
    core_.check(core_.api.vkMapMemory(core_.device, memory_, 0, VK_WHOLE_SIZE, 0, &address), doing);
    // Direct reads of files want aligned addresses, and drivers promise only 64 bytes.
    const auto begin = reinterpret_cast<uintptr_t>(address);
    place = (begin + kDataAlignment - 1) / kDataAlignment * kDataAlignment - begin;
    place = (place + wanted.alignment - 1) / wanted.alignment * wanted.alignment;
    place = std::min(place, allocation.allocationSize - wanted.size);
    data_ = static_cast<std::byte*>(address) + place;
  }
  core_.check(core_.api.vkBindBufferMemory(core_.device, handle_, memory_, place), doing);
  size_ = size;
}

std::unique_ptr<Device> open_vulkan(const OpenOptions& options) { return std::make_unique<VulkanDevice>(options); }

std::vector<Facts> list_vulkan() { return facts_of(inspect_all(VulkanInstance(false))); }

}  // namespace cfmoe::device
