// What the parts of one opened Vulkan device share.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "device/vulkan/api.h"
#include "device/vulkan/instance.h"

namespace cfmoe::device {

struct VulkanCore {
  std::unique_ptr<VulkanInstance> instance;
  std::unique_ptr<PhysicalDevice> physical;
  VkDevice device = VK_NULL_HANDLE;
  VulkanDeviceApi api;
  struct Queue {
    VkQueue handle = VK_NULL_HANDLE;
    std::mutex mutex;
  };
  std::array<Queue, 2> queues;  // the second only where there is one
  uint32_t queue_count = 1;

  void check(VkResult result, const std::string& doing) const {
    vulkan_check(result, doing + " (" + physical->facts.name + ")");
  }
};

class VulkanBuffer final : public Buffer {
 public:
  VulkanBuffer(VulkanCore& core, uint64_t size, Memory memory, bool separate);
  ~VulkanBuffer() override;
  VkBuffer handle() const { return handle_; }

 private:
  void create(uint64_t size, Memory memory, bool separate);
  void destroy();

  VulkanCore& core_;
  VkBuffer handle_ = VK_NULL_HANDLE;
  VkDeviceMemory memory_ = VK_NULL_HANDLE;
};

inline VkBuffer handle_of(const View& view) { return static_cast<const VulkanBuffer*>(view.buffer)->handle(); }

class VulkanKernel final : public Kernel {
 public:
  VulkanKernel(VulkanCore& core, KernelCode code) : Kernel(std::move(code)), core_(core) {}
  ~VulkanKernel() override { core_.api.vkDestroyPipeline(core_.device, pipeline, nullptr); }

  VkPipeline pipeline = VK_NULL_HANDLE;
  VkPipelineLayout layout = VK_NULL_HANDLE;  // the layouts belong to VulkanLayouts
  VkDescriptorSetLayout set_layout = VK_NULL_HANDLE;

 private:
  VulkanCore& core_;
};

// The layouts of kernels with so many buffers and scalars, shared among kernels.
class VulkanLayouts {
 public:
  explicit VulkanLayouts(VulkanCore& core) : core_(core) {}
  ~VulkanLayouts();
  VulkanLayouts(const VulkanLayouts&) = delete;
  VulkanLayouts& operator=(const VulkanLayouts&) = delete;
  VkDescriptorSetLayout set_layout(uint32_t buffers);
  VkPipelineLayout pipeline_layout(uint32_t buffers, uint32_t scalars);

 private:
  VulkanCore& core_;
  std::map<uint32_t, VkDescriptorSetLayout> sets_;
  std::map<std::pair<uint32_t, uint32_t>, VkPipelineLayout> pipelines_;
};

// Descriptor sets out of pools that are added as need be.
class VulkanDescriptors {
 public:
  explicit VulkanDescriptors(VulkanCore& core) : core_(core) {}
  ~VulkanDescriptors();
  VulkanDescriptors(const VulkanDescriptors&) = delete;
  VulkanDescriptors& operator=(const VulkanDescriptors&) = delete;

  struct Set {
    VkDescriptorPool pool = VK_NULL_HANDLE;
    VkDescriptorSet handle = VK_NULL_HANDLE;
  };
  Set allocate(VkDescriptorSetLayout layout);
  void free(const Set& set);

 private:
  VulkanCore& core_;
  std::mutex mutex_;
  std::vector<VkDescriptorPool> pools_;
};

class VulkanBindings final : public Bindings {
 public:
  VulkanBindings(VulkanCore& core, VulkanDescriptors& descriptors, const VulkanKernel& kernel,
                 std::span<const View> views);
  ~VulkanBindings() override { descriptors_.free(set_); }
  const VulkanKernel& vulkan_kernel() const { return static_cast<const VulkanKernel&>(kernel()); }
  VkDescriptorSet set() const { return set_.handle; }

 private:
  VulkanDescriptors& descriptors_;
  VulkanDescriptors::Set set_;
};

class VulkanStream final : public Stream {
 public:
  VulkanStream(VulkanCore& core, uint32_t queue);
  ~VulkanStream() override;

  void dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                const std::array<uint32_t, 3>& groups) override;
  void copy(const View& from, const View& to) override;
  void clear(const View& view) override;
  void barrier() override;
  void submit() override;
  void wait() override;
  bool can_defer() const override { return true; }
  void defer(bool on) override;
  void submit_deferred() override;
  void mark() override;
  std::vector<double> marks() override;

 private:
  struct Recording {
    VkCommandBuffer commands = VK_NULL_HANDLE;
    VkFence fence = VK_NULL_HANDLE;
    VkPipeline bound = VK_NULL_HANDLE;
    bool open = false;  // being recorded
  };
  VkCommandBuffer commands() { return current().commands; }
  Recording& current();  // what is being recorded
  Recording make(bool fence);
  void begin(Recording& recording);
  void end(Recording& recording);
  void start(std::span<const VkCommandBuffer> commands, VkFence fence);
  void spin(VkFence fence) const;
  void destroy();

  VulkanCore& core_;
  VulkanCore::Queue& queue_;
  VkCommandPool pool_ = VK_NULL_HANDLE;
  std::vector<Recording> recordings_;  // free ones from `next_` on; those before are submitted
  size_t next_ = 0;
  // In turn: one may be at work while the next is recorded, and has ended before that one is submitted.
  std::array<Recording, 2> deferred_;
  size_t deferred_next_ = 0;
  bool deferring_ = false;
  VkQueryPool queries_ = VK_NULL_HANDLE;
  uint32_t mark_count_ = 0;
};

}  // namespace cfmoe::device
