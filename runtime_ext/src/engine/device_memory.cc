// One block of device memory for programs and what they are given, mirrored on the host where need be.
#include "engine/device_memory.h"

#include <algorithm>
#include <cstring>

#include "engine/model_memory.h"

namespace cfmoe {
namespace {

uint64_t alignment_of(const device::Facts& facts) { return std::max<uint64_t>(512, facts.offset_alignment); }

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

// Mirrors are whole: their offsets are the workspace's own.
uint64_t block_bytes(const device::Facts& facts, const DeviceWorkspaceSizes& sizes) {
  const uint64_t step = alignment_of(facts);
  return round_up(sizes.programs, step) + round_up(sizes.tokens, step) + round_up(sizes.hidden, step) +
         2 * round_up(sizes.lists / 2, step) + round_up(sizes.work, step);
}

}  // namespace

uint64_t DeviceWorkspace::bytes(const device::Facts& facts, const DeviceWorkspaceSizes& sizes) {
  return block_bytes(facts, sizes) * (facts.unified ? 1 : 2);
}

DeviceWorkspace::DeviceWorkspace(device::Device& device, const DeviceWorkspaceSizes& sizes) {
  const uint64_t step = alignment_of(device.facts()), total = block_bytes(device.facts(), sizes);
  device_ = device.allocate(total, device::Memory::kModel);
  Uploader(device).clear(*device_);
  if (device_->data() == nullptr) {
    mirror_ = device.allocate(total, device::Memory::kHost);
    std::memset(mirror_->data(), 0, total);
  }
  uint64_t end = 0;
  const auto take = [&](uint64_t size) {
    const device::View view{device_.get(), end, size};
    end += round_up(size, step);
    return view;
  };
  programs = take(sizes.programs);
  tokens = take(sizes.tokens);
  hidden = take(sizes.hidden);
  rows_in = take(sizes.lists / 2);
  rows_out = take(sizes.lists / 2);
  work = take(sizes.work);
  const auto ints = [this](const device::View& from, uint64_t size) {
    return std::span<int32_t>(reinterpret_cast<int32_t*>(host(from)), size / sizeof(int32_t));
  };
  list_memory = ints(rows_in, rows_out.offset + rows_out.size - rows_in.offset);
  work_entries = ints(work, work.size);
}

std::byte* DeviceWorkspace::host(const device::View& view) const {
  return (mirror_ ? mirror_->data() : device_->data()) + view.offset;
}

void DeviceWorkspace::push(device::Recorder& recorder, const device::View& view) const {
  if (mirror_) recorder.copy({mirror_.get(), view.offset, view.size}, view);
}

void DeviceWorkspace::pull(device::Recorder& recorder, const device::View& view) const {
  if (mirror_) recorder.copy(view, {mirror_.get(), view.offset, view.size});
}

}  // namespace cfmoe
