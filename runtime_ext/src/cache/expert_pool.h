// Equal slots of one expert record each, in as few slabs of memory as needed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cache/expert_view.h"
#include "cache/slab.h"

namespace cfmoe {

class ExpertPool {
 public:
  // Kernels index a slab by 32-bit numbers, also in units of fp16: 4 GiB hold 2^31 of those.
  static constexpr uint64_t kMaxSlabBytes = uint64_t{4} << 30;

  // `stride` is a multiple of 16 KiB. Throws cfmoe::Error if a record does not fit a slab or the memory cannot be
  // reserved.
  ExpertPool(uint64_t stride, int32_t capacity, uint64_t slab_cap = kMaxSlabBytes);
  // In a device's memory, which outlives the pool.
  ExpertPool(uint64_t stride, int32_t capacity, SlabSource& source);

  // A free slot, the lowest; -1 if none is free.
  int32_t acquire();
  void release(int32_t slot);
  ExpertView view(int32_t slot) const;

  // Growing adds slabs. Shrinking gives memory back; at most `capacity` slots may be in use. The host's memory goes
  // back page by page, so it retires the highest free slots. A device's goes back by whole slabs: slots in use move
  // down, and the last slab is replaced by one of the size that is left, for whose sake both exist for a moment.
  using Moved = std::function<void(int32_t from, int32_t to)>;
  void resize(int32_t capacity, const Moved& moved = {});

  int32_t capacity() const { return capacity_; }
  int32_t used() const { return used_; }
  uint64_t bytes() const;
  size_t slabs() const;

 private:
  enum class State : uint8_t { kFree, kUsed, kRetired };
  struct Part {
    std::unique_ptr<Slab> memory;  // null while all of its slots are retired
    int32_t first = 0, count = 0;
  };
  const Part& part_of(int32_t slot) const;
  std::unique_ptr<Slab> allocate(int32_t slots) const;
  void grow(int32_t slots);
  void shrink(int32_t slots);
  void shrink_device(int32_t capacity, const Moved& moved);

  uint64_t stride_;
  uint64_t slab_cap_;
  SlabSource* source_ = nullptr;  // null: the host's memory
  int32_t capacity_ = 0, used_ = 0;
  std::vector<State> states_;
  std::vector<Part> slabs_;  // ascending `first`
};

}  // namespace cfmoe
