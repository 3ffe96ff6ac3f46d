// Equal slots of one expert record each, in as few slabs of memory as needed.
#include "cache/expert_pool.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace cfmoe {

ExpertPool::ExpertPool(uint64_t stride, int32_t capacity, uint64_t slab_cap)
    : stride_(stride), slab_cap_(std::min(slab_cap, kMaxSlabBytes)) {
  if (stride == 0 || stride % kBufferAlignment != 0) {
    throw Error(ErrorKind::kInternal,
                "expert pool: a stride of " + std::to_string(stride) + " bytes is no multiple of 16384");
  }
  if (stride > slab_cap_) {
    throw Error("one expert has " + std::to_string(stride) + " bytes, more than the largest buffer of " +
                std::to_string(slab_cap_) + " bytes; use a smaller quantisation");
  }
  resize(capacity);
}

int32_t ExpertPool::acquire() {
  auto it = std::find(states_.begin(), states_.end(), State::kFree);
  if (it == states_.end()) return -1;
  *it = State::kUsed;
  ++used_;
  return static_cast<int32_t>(it - states_.begin());
}

void ExpertPool::release(int32_t slot) {
  State& state = states_.at(static_cast<size_t>(slot));
  if (state != State::kUsed)
    throw Error(ErrorKind::kInternal, "expert pool: slot " + std::to_string(slot) + " is not in use");
  state = State::kFree;
  --used_;
}

const ExpertPool::Slab& ExpertPool::slab_of(int32_t slot) const {
  auto it = std::upper_bound(slabs_.begin(), slabs_.end(), slot,
                             [](int32_t value, const Slab& slab) { return value < slab.first; });
  return *std::prev(it);
}

ExpertView ExpertPool::view(int32_t slot) const {
  const Slab& slab = slab_of(slot);
  uint64_t offset = static_cast<uint64_t>(slot - slab.first) * stride_;
  return ExpertView{slab.memory.data(), static_cast<int64_t>(static_cast<uint64_t>(slab.count) * stride_ / 4),
                    static_cast<int32_t>(offset / 4)};
}

size_t ExpertPool::slabs() const {
  return static_cast<size_t>(
      std::count_if(slabs_.begin(), slabs_.end(), [](const Slab& slab) { return slab.memory.size() > 0; }));
}

void ExpertPool::resize(int32_t capacity) {
  if (capacity < used_) {
    throw Error(ErrorKind::kInternal,
                "expert pool: " + std::to_string(used_) + " slots are in use, more than " + std::to_string(capacity));
  }
  if (capacity > capacity_) grow(capacity - capacity_);
  if (capacity < capacity_) shrink(capacity_ - capacity);
}

void ExpertPool::grow(int32_t slots) {
  // Retired slots first: their addresses are still ours.
  for (Slab& slab : slabs_) {
    for (int32_t slot = slab.first; slot < slab.first + slab.count && slots > 0; ++slot) {
      State& state = states_[static_cast<size_t>(slot)];
      if (state != State::kRetired) continue;
      if (slab.memory.size() == 0) slab.memory = AlignedBuffer(static_cast<uint64_t>(slab.count) * stride_);
      state = State::kFree;
      ++capacity_;
      --slots;
    }
  }
  auto per_slab = static_cast<int64_t>(slab_cap_ / stride_);
  while (slots > 0) {
    auto count = static_cast<int32_t>(std::min<int64_t>(slots, per_slab));
    slabs_.push_back(
        Slab{AlignedBuffer(static_cast<uint64_t>(count) * stride_), static_cast<int32_t>(states_.size()), count});
    states_.insert(states_.end(), static_cast<size_t>(count), State::kFree);
    capacity_ += count;
    slots -= count;
  }
}

void ExpertPool::shrink(int32_t slots) {
  for (auto slab = slabs_.rbegin(); slab != slabs_.rend() && slots > 0; ++slab) {
    bool all_retired = true;
    for (int32_t slot = slab->first + slab->count - 1; slot >= slab->first; --slot) {
      State& state = states_[static_cast<size_t>(slot)];
      if (state == State::kFree && slots > 0) {
        state = State::kRetired;
        slab->memory.give_back(static_cast<uint64_t>(slot - slab->first) * stride_, stride_);
        --capacity_;
        --slots;
      }
      all_retired = all_retired && state == State::kRetired;
    }
    if (all_retired) slab->memory = AlignedBuffer();
  }
}

}  // namespace cfmoe
