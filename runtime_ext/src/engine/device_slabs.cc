// Slabs of a device, filled directly or through staging buffers.
#include "engine/device_slabs.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "store/aligned_buffer.h"
#include "store/file_handle.h"

namespace cfmoe {
namespace {

// A pool that shrinks holds its last slab twice for a moment, so that slab is small where memory is scarce.
constexpr uint64_t kUnifiedSlab = uint64_t{128} << 20, kSeparateSlab = uint64_t{2} << 30;

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

}  // namespace

DeviceSlab::DeviceSlab(std::unique_ptr<device::Buffer> buffer) : buffer_(std::move(buffer)) {}

uint64_t DeviceSlabs::slab_cap(const device::Facts& facts) {
  return std::min({facts.unified ? kUnifiedSlab : kSeparateSlab, facts.max_binding_bytes, facts.max_buffer_bytes});
}

uint64_t DeviceSlabs::staging_bytes(const device::Facts& facts, uint64_t stride, int32_t staging) {
  return facts.unified ? 0 : stride * static_cast<uint64_t>(staging);
}

DeviceSlabs::DeviceSlabs(device::Device& device, device::Recorder& recorder, uint64_t stride, int32_t staging)
    : device_(device), recorder_(recorder), stream_(device.make_stream()) {
  for (int32_t i = 0; i < staging && !device.facts().unified; ++i)
    staging_.push_back({device.allocate(stride, device::Memory::kHost), device.make_stream()});
}

std::unique_ptr<Slab> DeviceSlabs::allocate(uint64_t bytes) {
  return std::make_unique<DeviceSlab>(device_.allocate(bytes, device::Memory::kModel));
}

void DeviceSlabs::copy(const Slab& from, uint64_t from_offset, const Slab& to, uint64_t to_offset, uint64_t bytes) {
  if (from.data() != nullptr) {
    std::memcpy(to.data() + to_offset, from.data() + from_offset, bytes);
    return;
  }
  stream_->copy({&static_cast<const DeviceSlab&>(from).buffer(), from_offset, bytes},
                {&static_cast<const DeviceSlab&>(to).buffer(), to_offset, bytes});
  stream_->submit();
  stream_->wait();
}

void DeviceSlabs::fill(const Slab& to, uint64_t offset, uint64_t bytes, const std::function<void(void*)>& read) {
  if (std::byte* data = to.data(); data != nullptr) {
    if (reinterpret_cast<uintptr_t>(data) % kDirectAlignment == 0) {
      read(data + offset);
      return;
    }
    // A driver that maps its memory anywhere: direct reads want better.
    const AlignedBuffer bounce(round_up(bytes, kDirectAlignment));
    read(bounce.data());
    std::memcpy(data + offset, bounce.data(), bytes);
    return;
  }
  Staging staging;
  {
    std::unique_lock lock(mutex_);
    returned_.wait(lock, [this] { return !staging_.empty(); });
    staging = std::move(staging_.back());
    staging_.pop_back();
  }
  const auto give_back = [&] {
    const std::lock_guard lock(mutex_);
    staging_.push_back(std::move(staging));
    returned_.notify_one();
  };
  try {
    read(staging.buffer->data());
    const uint64_t words = round_up(bytes, 4);
    staging.stream->copy({staging.buffer.get(), 0, words},
                         {&static_cast<const DeviceSlab&>(to).buffer(), offset, words});
    staging.stream->submit();
    staging.stream->wait();
  } catch (...) {
    give_back();
    throw;
  }
  give_back();
}

}  // namespace cfmoe
