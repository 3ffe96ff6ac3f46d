// Equal slots of one expert record each, in as few slabs of memory as needed.
#include "cache/expert_pool.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"
#include "store/aligned_buffer.h"

namespace cfmoe {
namespace {

class HostSlab final : public Slab {
 public:
  explicit HostSlab(uint64_t bytes) : memory_(bytes, Pages::kHuge) {}
  std::byte* data() const override { return memory_.data(); }
  uint64_t size() const override { return memory_.size(); }
  void give_back(uint64_t offset, uint64_t bytes) { memory_.give_back(offset, bytes); }

 private:
  AlignedBuffer memory_;
};

}  // namespace

ExpertPool::ExpertPool(uint64_t stride, int32_t capacity, SlabSource& source)
    : ExpertPool(stride, 0, source.max_bytes()) {
  source_ = &source;
  resize(capacity);
}

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

const ExpertPool::Part& ExpertPool::part_of(int32_t slot) const {
  auto it = std::upper_bound(slabs_.begin(), slabs_.end(), slot,
                             [](int32_t value, const Part& slab) { return value < slab.first; });
  return *std::prev(it);
}

ExpertView ExpertPool::view(int32_t slot) const {
  const Part& slab = part_of(slot);
  uint64_t offset = static_cast<uint64_t>(slot - slab.first) * stride_;
  return ExpertView{slab.memory->data(), static_cast<int64_t>(static_cast<uint64_t>(slab.count) * stride_ / 4),
                    static_cast<int32_t>(offset / 4), source_ == nullptr ? nullptr : slab.memory.get()};
}

size_t ExpertPool::slabs() const {
  return static_cast<size_t>(
      std::count_if(slabs_.begin(), slabs_.end(), [](const Part& slab) { return slab.memory != nullptr; }));
}

std::unique_ptr<Slab> ExpertPool::allocate(int32_t slots) const {
  const uint64_t bytes = static_cast<uint64_t>(slots) * stride_;
  if (source_ != nullptr) return source_->allocate(bytes);
  return std::make_unique<HostSlab>(bytes);
}

uint64_t ExpertPool::bytes() const {
  if (source_ == nullptr) return static_cast<uint64_t>(capacity_) * stride_;
  uint64_t bytes = 0;
  for (const Part& slab : slabs_) bytes += slab.memory->size();
  return bytes;
}

void ExpertPool::resize(int32_t capacity, const Moved& moved) {
  if (capacity < used_) {
    throw Error(ErrorKind::kInternal,
                "expert pool: " + std::to_string(used_) + " slots are in use, more than " + std::to_string(capacity));
  }
  if (capacity > capacity_) grow(capacity - capacity_);
  if (capacity >= capacity_) return;
  if (source_ != nullptr) {
    shrink_device(capacity, moved);
  } else {
    shrink(capacity_ - capacity);
  }
}

void ExpertPool::grow(int32_t slots) {
  // Retired slots first: their addresses are still ours.
  for (Part& slab : slabs_) {
    for (int32_t slot = slab.first; slot < slab.first + slab.count && slots > 0; ++slot) {
      State& state = states_[static_cast<size_t>(slot)];
      if (state != State::kRetired) continue;
      if (!slab.memory) slab.memory = allocate(slab.count);
      state = State::kFree;
      ++capacity_;
      --slots;
    }
  }
  auto per_slab = static_cast<int64_t>(slab_cap_ / stride_);
  while (slots > 0) {
    auto count = static_cast<int32_t>(std::min<int64_t>(slots, per_slab));
    slabs_.push_back(Part{allocate(count), static_cast<int32_t>(states_.size()), count});
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
        static_cast<HostSlab&>(*slab->memory).give_back(static_cast<uint64_t>(slot - slab->first) * stride_, stride_);
        --capacity_;
        --slots;
      }
      all_retired = all_retired && state == State::kRetired;
    }
    if (all_retired) slab->memory = nullptr;
  }
}

// A device's pool retires nothing: its slots are 0 to capacity - 1.
void ExpertPool::shrink_device(int32_t capacity, const Moved& moved) {
  const auto copy = [this](int32_t from, const Part& target, int32_t to) {
    const Part& part = part_of(from);
    source_->copy(*part.memory, static_cast<uint64_t>(from - part.first) * stride_, *target.memory,
                  static_cast<uint64_t>(to - target.first) * stride_, stride_);
  };
  int32_t free = 0;
  for (int32_t slot = capacity; slot < capacity_; ++slot) {
    if (states_[static_cast<size_t>(slot)] != State::kUsed) continue;
    while (states_[static_cast<size_t>(free)] == State::kUsed) ++free;
    copy(slot, part_of(free), free);
    states_[static_cast<size_t>(free)] = State::kUsed;
    moved(slot, free);
  }
  while (!slabs_.empty() && slabs_.back().first >= capacity) slabs_.pop_back();
  states_.resize(static_cast<size_t>(capacity));
  capacity_ = capacity;
  if (slabs_.empty() || slabs_.back().first + slabs_.back().count == capacity) return;
  Part& last = slabs_.back();
  const int32_t count = capacity - last.first;
  Part smaller{nullptr, last.first, count};
  try {
    smaller.memory = allocate(count);
  } catch (const Error&) {
    // No room for both: the slab stays as large as it was, and bytes() says so.
    last.count = count;
    return;
  }
  for (int32_t slot = last.first; slot < capacity; ++slot) {
    if (states_[static_cast<size_t>(slot)] == State::kUsed) copy(slot, smaller, slot);
  }
  last = std::move(smaller);
}

}  // namespace cfmoe
