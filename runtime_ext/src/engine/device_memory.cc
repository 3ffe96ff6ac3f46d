// One block of device memory for programs and what they are given; with memory of its own, a device reads and writes
// what travels in blocks that the host reaches too, or has a mirror of everything.
#include "engine/device_memory.h"

#include <algorithm>
#include <cstring>

#include "engine/model_memory.h"

namespace cfmoe {
namespace {

uint64_t alignment_of(const device::Facts& facts) { return std::max<uint64_t>(512, facts.offset_alignment); }

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

// Host and device meet in blocks of their own.
bool meets(const device::Facts& facts) { return !facts.unified && facts.binds_host; }

struct Blocks {
  uint64_t programs = 0, given = 0, results = 0;

  Blocks(const device::Facts& facts, const DeviceWorkspaceSizes& sizes) {
    const uint64_t step = alignment_of(facts);
    programs = round_up(sizes.programs, step);
    given = round_up(sizes.tokens, step) + round_up(sizes.hidden, step) + 2 * round_up(sizes.lists / 2, step) +
            round_up(sizes.work, step);
    if (!meets(facts)) return;
    given += round_up(sizes.ids, step) + round_up(sizes.weights, step);
    results = round_up(sizes.results, step);
  }
};

}  // namespace

uint64_t DeviceWorkspace::bytes(const device::Facts& facts, const DeviceWorkspaceSizes& sizes) {
  const Blocks blocks(facts, sizes);
  if (meets(facts)) return blocks.programs + 2 * blocks.given + blocks.results;
  return (blocks.programs + blocks.given) * (facts.unified ? 1 : 2);
}

DeviceWorkspace::DeviceWorkspace(device::Device& device, const DeviceWorkspaceSizes& sizes) {
  const device::Facts& facts = device.facts();
  const uint64_t step = alignment_of(facts);
  const Blocks blocks(facts, sizes);
  const uint64_t total = blocks.programs + (meets(facts) ? 0 : blocks.given);
  device_ = device.allocate(total, device::Memory::kModel);
  Uploader(device).clear(*device_);
  programs = {device_.get(), 0, sizes.programs};
  const device::Buffer* given = device_.get();
  uint64_t end = blocks.programs;
  if (meets(facts)) {
    upload_ = device.allocate(blocks.given, device::Memory::kUpload);
    upload_mirror_ = AlignedBuffer(blocks.given);
    results_ = device.allocate(blocks.results, device::Memory::kHost);
    for (const device::Buffer* buffer : {upload_.get(), results_.get()}) std::memset(buffer->data(), 0, buffer->size());
    std::memset(upload_mirror_.data(), 0, blocks.given);
    results = {results_.get(), 0, sizes.results};
    given = upload_.get();
    end = 0;
  } else if (!facts.unified) {
    mirror_ = device.allocate(total, device::Memory::kHost);
    std::memset(mirror_->data(), 0, total);
  }
  const auto take = [&](uint64_t size) {
    const device::View view{given, end, size};
    end += round_up(size, step);
    return view;
  };
  tokens = take(sizes.tokens);
  hidden = take(sizes.hidden);
  rows_in = take(sizes.lists / 2);
  rows_out = take(sizes.lists / 2);
  work = take(sizes.work);
  if (upload_) {
    ids = take(sizes.ids);
    weights = take(sizes.weights);
  }
  const auto ints = [this](const device::View& from, uint64_t size) {
    return std::span<int32_t>(reinterpret_cast<int32_t*>(host(from)), size / sizeof(int32_t));
  };
  list_memory = ints(rows_in, rows_out.offset + rows_out.size - rows_in.offset);
  work_entries = ints(work, work.size);
}

std::byte* DeviceWorkspace::host(const device::View& view) const {
  if (view.buffer == upload_.get()) return upload_mirror_.data() + view.offset;
  return (mirror_ ? mirror_->data() : view.buffer->data()) + view.offset;
}

void DeviceWorkspace::push(device::Recorder& recorder, const device::View& view) const {
  if (mirror_) {
    recorder.copy({mirror_.get(), view.offset, view.size}, view);
  } else if (view.buffer == upload_.get()) {
    std::memcpy(view.data(), host(view), view.size);
  }
}

void DeviceWorkspace::pull(device::Recorder& recorder, const device::View& view) const {
  if (mirror_) recorder.copy(view, {mirror_.get(), view.offset, view.size});
}

}  // namespace cfmoe
