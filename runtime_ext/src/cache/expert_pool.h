// Equal slots of one expert record each, in as few slabs of memory as needed.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/expert_view.h"
#include "store/aligned_buffer.h"

namespace cfmoe {

class ExpertPool {
 public:
  // Kernels index a slab by 32-bit numbers, also in units of fp16: 4 GiB hold 2^31 of those. Devices with smaller
  // buffers pass their own cap.
  static constexpr uint64_t kMaxSlabBytes = uint64_t{4} << 30;

  // `stride` is a multiple of 16 KiB. Throws cfmoe::Error if a record does not fit a slab or the memory cannot be
  // reserved.
  ExpertPool(uint64_t stride, int32_t capacity, uint64_t slab_cap = kMaxSlabBytes);

  // A free slot, the lowest; -1 if none is free.
  int32_t acquire();
  void release(int32_t slot);
  ExpertView view(int32_t slot) const;

  // Growing adds slabs. Shrinking retires the highest free slots and gives their memory back; at most `capacity` slots
  // may be in use.
  void resize(int32_t capacity);

  int32_t capacity() const { return capacity_; }
  int32_t used() const { return used_; }
  uint64_t bytes() const { return static_cast<uint64_t>(capacity_) * stride_; }
  size_t slabs() const;

 private:
  enum class State : uint8_t { kFree, kUsed, kRetired };
  struct Slab {
    AlignedBuffer memory;  // empty while all of its slots are retired
    int32_t first = 0, count = 0;
  };
  const Slab& slab_of(int32_t slot) const;
  void grow(int32_t slots);
  void shrink(int32_t slots);

  uint64_t stride_;
  uint64_t slab_cap_;
  int32_t capacity_ = 0, used_ = 0;
  std::vector<State> states_;
  std::vector<Slab> slabs_;  // ascending `first`
};

}  // namespace cfmoe
