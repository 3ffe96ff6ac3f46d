// The expert pool in a device's memory.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "cache/slab.h"
#include "device/device.h"
#include "device/recorder.h"
#include "engine/model_memory.h"

namespace cfmoe {

class DeviceSlab final : public Slab {
 public:
  explicit DeviceSlab(std::unique_ptr<device::Buffer> buffer);
  std::byte* data() const override { return buffer_->data(); }
  uint64_t size() const override { return buffer_->size(); }
  const device::Buffer& buffer() const { return *buffer_; }

  // Expert kernels bound to this slab, which end with it: by who bound them, and the offsets of activation, rows and
  // scratch.
  struct Bound {
    std::unique_ptr<device::Bindings> gate_up, down;
  };
  using Key = std::tuple<const void*, uint64_t, uint64_t, uint64_t>;
  std::map<Key, Bound>& bound() const { return bound_; }

 private:
  std::unique_ptr<device::Buffer> buffer_;
  mutable std::map<Key, Bound> bound_;
};

// Where memory is unified, files are read straight into slots; else into staging buffers, one per reading thread,
// whose copies run beside the kernels.
class DeviceSlabs final : public SlabSource {
 public:
  // `recorder` is that of the kernels that use the slots.
  DeviceSlabs(device::Device& device, device::Recorder& recorder, uint64_t stride, int32_t staging);
  static uint64_t staging_bytes(const device::Facts& facts, uint64_t stride, int32_t staging);
  static uint64_t slab_cap(const device::Facts& facts);

  uint64_t max_bytes() const override { return slab_cap(device_.facts()); }
  std::unique_ptr<Slab> allocate(uint64_t bytes) override;
  void copy(const Slab& from, uint64_t from_offset, const Slab& to, uint64_t to_offset, uint64_t bytes) override;
  void fill(const Slab& to, uint64_t offset, uint64_t bytes, const std::function<void(void*)>& read) override;
  void quiesce() override { recorder_.finish(); }

 private:
  struct Staging {
    std::unique_ptr<device::Buffer> buffer;
    std::unique_ptr<device::Stream> stream;
  };
  device::Device& device_;
  device::Recorder& recorder_;
  std::unique_ptr<device::Stream> stream_;  // of copy()
  std::mutex mutex_;
  std::condition_variable returned_;
  std::vector<Staging> staging_;  // free ones
};

}  // namespace cfmoe
