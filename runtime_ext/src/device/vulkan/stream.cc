// Command buffers: recorded, submitted one after the other, used again once a wait has seen them end.
#include <chrono>
#include <limits>

#include "device/vulkan/core.h"
#include "error.h"

namespace cfmoe::device {
namespace {

constexpr VkPipelineStageFlags kWork = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
constexpr VkAccessFlags kWrites = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT;
// A driver that sleeps takes some twenty microseconds to wake, and a decoded token waits once per layer. Where there is
// a battery, not for long.
constexpr std::chrono::microseconds kSpin{200}, kDiscreteSpin{2000};
constexpr VkAccessFlags kReads = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_TRANSFER_READ_BIT;

}  // namespace

VulkanStream::VulkanStream(VulkanCore& core, uint32_t queue) : core_(core), queue_(core.queues[queue]) {
  try {
    auto info = vulkan_struct<VkCommandPoolCreateInfo>(VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO);
    info.flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT | VK_COMMAND_POOL_CREATE_TRANSIENT_BIT;
    info.queueFamilyIndex = core_.physical->queue_family;
    core_.check(core_.api.vkCreateCommandPool(core_.device, &info, nullptr, &pool_), "opening a queue");
    if (core_.physical->timestamp_bits > 0) {
      auto queries = vulkan_struct<VkQueryPoolCreateInfo>(VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO);
      queries.queryType = VK_QUERY_TYPE_TIMESTAMP;
      queries.queryCount = kMaxMarks;
      core_.check(core_.api.vkCreateQueryPool(core_.device, &queries, nullptr, &queries_), "opening a queue");
    }
  } catch (...) {
    destroy();
    throw;
  }
}

VulkanStream::~VulkanStream() {
  {
    // What was submitted must end before its command buffers go. A lost device has ended everything.
    const std::lock_guard lock(queue_.mutex);
    if (next_ > 0) core_.api.vkDeviceWaitIdle(core_.device);
  }
  destroy();
}

void VulkanStream::destroy() {
  for (const Recording& recording : recordings_) core_.api.vkDestroyFence(core_.device, recording.fence, nullptr);
  core_.api.vkDestroyQueryPool(core_.device, queries_, nullptr);
  core_.api.vkDestroyCommandPool(core_.device, pool_, nullptr);
}

VulkanStream::Recording VulkanStream::make(bool fence) {
  Recording recording;
  auto info = vulkan_struct<VkCommandBufferAllocateInfo>(VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO);
  info.commandPool = pool_;
  info.level = VK_COMMAND_BUFFER_LEVEL_PRIMARY;
  info.commandBufferCount = 1;
  core_.check(core_.api.vkAllocateCommandBuffers(core_.device, &info, &recording.commands), "recording commands");
  if (!fence) return recording;
  const auto create = vulkan_struct<VkFenceCreateInfo>(VK_STRUCTURE_TYPE_FENCE_CREATE_INFO);
  core_.check(core_.api.vkCreateFence(core_.device, &create, nullptr, &recording.fence), "recording commands");
  return recording;
}

VulkanStream::Recording& VulkanStream::current() {
  if (deferring_) return deferred_[deferred_next_];
  if (next_ == recordings_.size()) recordings_.push_back(make(true));
  Recording& recording = recordings_[next_];
  if (!recording.open) begin(recording);
  return recording;
}

void VulkanStream::begin(Recording& recording) {
  auto info = vulkan_struct<VkCommandBufferBeginInfo>(VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO);
  info.flags = VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT;
  core_.check(core_.api.vkBeginCommandBuffer(recording.commands, &info), "recording commands");
  recording.open = true;
  recording.bound = VK_NULL_HANDLE;
}

void VulkanStream::end(Recording& recording) {
  const VkMemoryBarrier memory{VK_STRUCTURE_TYPE_MEMORY_BARRIER, nullptr, kWrites, VK_ACCESS_HOST_READ_BIT};
  core_.api.vkCmdPipelineBarrier(recording.commands, kWork, VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &memory, 0, nullptr, 0,
                                 nullptr);
  recording.open = false;
  core_.check(core_.api.vkEndCommandBuffer(recording.commands), "recording commands");
}

void VulkanStream::dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                            const std::array<uint32_t, 3>& groups) {
  Recording& recording = current();
  const VkCommandBuffer out = recording.commands;
  const auto& bound = static_cast<const VulkanBindings&>(bindings);
  const VulkanKernel& kernel = bound.vulkan_kernel();
  const Facts& facts = core_.physical->facts;
  for (size_t i = 0; i < 3; ++i) {
    if (groups[i] > facts.max_groups[i]) {
      throw Error("kernel " + kernel.code().name + " wants " + std::to_string(groups[i]) +
                  " workgroups, the device's limit is " + std::to_string(facts.max_groups[i]) + " (" + facts.name +
                  "): use --device cpu");
    }
  }
  if (recording.bound != kernel.pipeline) {
    core_.api.vkCmdBindPipeline(out, VK_PIPELINE_BIND_POINT_COMPUTE, kernel.pipeline);
    recording.bound = kernel.pipeline;
  }
  const VkDescriptorSet set = bound.set();
  core_.api.vkCmdBindDescriptorSets(out, VK_PIPELINE_BIND_POINT_COMPUTE, kernel.layout, 0, 1, &set, 0, nullptr);
  if (!scalars.empty()) {
    core_.api.vkCmdPushConstants(out, kernel.layout, VK_SHADER_STAGE_COMPUTE_BIT, 0,
                                 static_cast<uint32_t>(scalars.size_bytes()), scalars.data());
  }
  core_.api.vkCmdDispatch(out, groups[0], groups[1], groups[2]);
}

void VulkanStream::copy(const View& from, const View& to) {
  const VkBufferCopy region{from.offset, to.offset, from.size};
  core_.api.vkCmdCopyBuffer(commands(), handle_of(from), handle_of(to), 1, &region);
}

void VulkanStream::clear(const View& view) {
  core_.api.vkCmdFillBuffer(commands(), handle_of(view), view.offset, view.size, 0);
}

void VulkanStream::barrier() {
  const VkMemoryBarrier memory{VK_STRUCTURE_TYPE_MEMORY_BARRIER, nullptr, kWrites, kReads | kWrites};
  core_.api.vkCmdPipelineBarrier(commands(), kWork, kWork, 0, 1, &memory, 0, nullptr, 0, nullptr);
}

void VulkanStream::start(std::span<const VkCommandBuffer> commands, VkFence fence) {
  auto info = vulkan_struct<VkSubmitInfo>(VK_STRUCTURE_TYPE_SUBMIT_INFO);
  info.commandBufferCount = static_cast<uint32_t>(commands.size());
  info.pCommandBuffers = commands.data();
  const std::lock_guard lock(queue_.mutex);
  core_.check(core_.api.vkQueueSubmit(queue_.handle, 1, &info, fence), "running kernels");
  ++next_;
}

void VulkanStream::submit() {
  if (next_ == recordings_.size() || !recordings_[next_].open) return;
  Recording& recording = recordings_[next_];
  end(recording);
  start({&recording.commands, 1}, recording.fence);
}

void VulkanStream::defer(bool on) {
  Recording& recording = deferred_[deferred_next_];
  deferring_ = on;
  if (!on) {
    end(recording);
    return;
  }
  if (recording.commands == VK_NULL_HANDLE) recording = make(false);
  // An error may have left it half recorded.
  if (recording.open) core_.check(core_.api.vkResetCommandBuffer(recording.commands, 0), "recording commands");
  begin(recording);
}

void VulkanStream::submit_deferred() {
  if (next_ == recordings_.size()) recordings_.push_back(make(true));
  Recording& recording = recordings_[next_];
  const VkCommandBuffer both[] = {recording.commands, deferred_[deferred_next_].commands};
  const size_t skipped = recording.open ? 0 : 1;
  if (recording.open) end(recording);
  start(std::span(both).subspan(skipped), recording.fence);
  deferred_next_ = 1 - deferred_next_;
}

void VulkanStream::wait() {
  if (next_ == 0) return;
  // Each fence by itself: of one that was not waited for, nobody could say whether it may be used again.
  if (core_.physical->facts.type != Type::kCpu) spin(recordings_[next_ - 1].fence);
  for (size_t i = next_; i-- > 0;) {
    const VkResult result = core_.api.vkWaitForFences(core_.device, 1, &recordings_[i].fence, VK_TRUE,
                                                      std::numeric_limits<uint64_t>::max());
    core_.check(result, "waiting for kernels");
    core_.check(core_.api.vkResetFences(core_.device, 1, &recordings_[i].fence), "waiting for kernels");
  }
  // The recording under way, if any, lies at next_ and moves to the front.
  if (next_ < recordings_.size() && recordings_[next_].open) std::swap(recordings_[0], recordings_[next_]);
  next_ = 0;
  core_.instance->check_messages();
}

void VulkanStream::spin(VkFence fence) const {
  const bool discrete = core_.physical->facts.type == Type::kDiscrete;
  const auto end = std::chrono::steady_clock::now() + (discrete ? kDiscreteSpin : kSpin);
  while (core_.api.vkGetFenceStatus(core_.device, fence) == VK_NOT_READY && std::chrono::steady_clock::now() < end) {
  }
}

void VulkanStream::mark() {
  if (queries_ == VK_NULL_HANDLE) throw Error("Vulkan: " + core_.physical->facts.name + " keeps no time");
  if (mark_count_ >= kMaxMarks) throw Error(ErrorKind::kInternal, "too many marks");
  if (mark_count_ == 0) core_.api.vkCmdResetQueryPool(commands(), queries_, 0, kMaxMarks);
  core_.api.vkCmdWriteTimestamp(commands(), VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, queries_, mark_count_++);
}

std::vector<double> VulkanStream::marks() {
  std::vector<uint64_t> ticks(mark_count_);
  if (mark_count_ > 0) {
    core_.check(core_.api.vkGetQueryPoolResults(core_.device, queries_, 0, mark_count_, ticks.size() * 8, ticks.data(),
                                                8, VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT),
                "reading times");
  }
  mark_count_ = 0;
  std::vector<double> seconds;
  for (const uint64_t tick : ticks)
    seconds.push_back(static_cast<double>(tick) * static_cast<double>(core_.physical->timestamp_period) * 1e-9);
  return seconds;
}

}  // namespace cfmoe::device
