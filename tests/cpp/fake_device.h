// A device made of host memory for the toy model: its work is put off as long as waiting allows, and what no barrier
// orders runs backwards, so that a missing barrier or wait changes results.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "error.h"
#include "store/aligned_buffer.h"

namespace cfmoe::test {

// What the fake devices opened from now on do wrong, and what they count.
struct FakeSettings {
  bool unified = true;
  bool binds_host = false;  // where memory is not unified
  bool defers = true;
  std::vector<std::string> features = {"float16"};
  uint64_t memory_bytes = uint64_t{1} << 40;  // allocations beyond it fail
  int64_t waits_until_lost = -1;              // negative: never
  bool compiles = true;
  uint64_t max_buffer_bytes = uint64_t{1} << 30;
  int64_t live_bytes = 0, dispatches = 0, barriers = 0, submits = 0;
};
inline FakeSettings& fake_settings() {
  static FakeSettings settings;
  return settings;
}

// Reading threads have streams of their own.
inline int64_t count(int64_t& counter, int64_t by) { return std::atomic_ref(counter).fetch_add(by); }

class FakeBuffer final : public device::Buffer {
 public:
  FakeBuffer(uint64_t size, bool mapped) : memory_(size) {
    size_ = size;
    if (mapped) data_ = memory_.data();
    std::memset(memory_.data(), 0xab, size);
    count(fake_settings().live_bytes, static_cast<int64_t>(size));
  }
  ~FakeBuffer() override { count(fake_settings().live_bytes, -static_cast<int64_t>(size_)); }
  std::byte* raw() const { return memory_.data(); }

 private:
  AlignedBuffer memory_;
};

inline std::byte* raw(const device::View& view) {
  return static_cast<const FakeBuffer*>(view.buffer)->raw() + view.offset;
}

using FakeFunction = std::function<void(const std::vector<std::byte*>&, const std::vector<int32_t>&)>;
const std::map<std::string, FakeFunction>& fake_kernels();

class FakeKernel final : public device::Kernel {
 public:
  FakeKernel(device::KernelCode code, FakeFunction function) : Kernel(std::move(code)), function(std::move(function)) {}
  FakeFunction function;
};

class FakeBindings final : public device::Bindings {
 public:
  using Bindings::Bindings;
};

class FakeStream final : public device::Stream {
 public:
  void dispatch(const device::Bindings& bindings, std::span<const int32_t> scalars,
                const std::array<uint32_t, 3>&) override {
    count(fake_settings().dispatches, 1);
    std::vector<std::byte*> buffers;
    for (const auto& use : bindings.uses()) buffers.push_back(raw(use.view));
    const std::vector<int32_t> numbers(scalars.begin(), scalars.end());
    const auto& function = static_cast<const FakeKernel&>(bindings.kernel()).function;
    list().back().push_back([=] { function(buffers, numbers); });
  }
  void copy(const device::View& from, const device::View& to) override {
    list().back().push_back([=, source = raw(from), target = raw(to)] { std::memcpy(target, source, from.size); });
  }
  void clear(const device::View& view) override {
    list().back().push_back([=, target = raw(view)] { std::memset(target, 0, view.size); });
  }
  void barrier() override {
    count(fake_settings().barriers, 1);
    list().emplace_back();
  }
  bool can_defer() const override { return fake_settings().defers; }
  void defer(bool on) override {
    deferring_ = on;
    if (on) deferred_ = {{}};
  }
  void submit_deferred() override {
    recorded_.insert(recorded_.end(), deferred_.begin(), deferred_.end());
    submit();
  }
  void submit() override {
    size_t commands = 0;
    for (const auto& group : recorded_) commands += group.size();
    if (commands == submitted_commands_) return;
    count(fake_settings().submits, 1);
    submitted_ = recorded_.size();
    submitted_commands_ = commands;
  }
  void wait() override {
    if (std::atomic_ref(fake_settings().waits_until_lost).load() >= 0 &&
        count(fake_settings().waits_until_lost, -1) <= 0) {
      std::atomic_ref(fake_settings().waits_until_lost).store(0);
      throw Error(ErrorKind::kInternal, "Fake: the device was lost while waiting for kernels: use --device cpu");
    }
    for (size_t i = 0; i < submitted_; ++i) {
      for (auto work = recorded_[i].rbegin(); work != recorded_[i].rend(); ++work) (*work)();
    }
    recorded_ = {{}};
    submitted_ = submitted_commands_ = 0;
  }
  void mark() override {}
  std::vector<double> marks() override { return {}; }

 private:
  using List = std::vector<std::vector<std::function<void()>>>;  // between barriers
  List& list() { return deferring_ ? deferred_ : recorded_; }

  List recorded_ = {{}}, deferred_ = {{}};
  bool deferring_ = false;
  size_t submitted_ = 0, submitted_commands_ = 0;
};

class FakeDevice final : public device::Device {
 public:
  FakeDevice() { facts_ = describe(); }
  static device::Facts describe() {
    const FakeSettings& settings = fake_settings();
    device::Facts facts;
    facts.kind = device::Kind::kMetal;
    facts.type = settings.unified ? device::Type::kIntegrated : device::Type::kDiscrete;
    facts.name = "Fake GPU";
    facts.driver = "fake 1";
    facts.features = settings.features;
    facts.unified = settings.unified;
    facts.binds_host = settings.binds_host;
    facts.memory_bytes = settings.memory_bytes;
    facts.max_buffer_bytes = facts.max_binding_bytes = settings.max_buffer_bytes;
    facts.offset_alignment = 64;
    facts.max_buffers = facts.max_scalars = 32;
    facts.max_group_threads = 256;
    facts.max_group = {256, 256, 64};
    facts.max_groups = {65535, 65535, 65535};
    return facts;
  }
  uint64_t available_memory() const override { return facts_.memory_bytes; }
  std::unique_ptr<device::Buffer> allocate(uint64_t size, device::Memory memory) override {
    if (static_cast<uint64_t>(fake_settings().live_bytes) + size > fake_settings().memory_bytes)
      throw Error("Fake: out of device memory: use a smaller --memory-budget or --device cpu");
    return std::make_unique<FakeBuffer>(size, memory != device::Memory::kModel || facts_.unified);
  }
  std::vector<std::unique_ptr<device::Kernel>> load(std::string_view library,
                                                    std::span<const device::KernelCode> kernels, uint64_t) override {
    std::vector<std::unique_ptr<device::Kernel>> out;
    for (const device::KernelCode& code : kernels) {
      device::check_kernel(facts_, code, library.size());
      if (!fake_settings().compiles) throw Error("kernel " + code.name + " does not compile: use --device cpu");
      out.push_back(std::make_unique<FakeKernel>(code, fake_kernels().at(code.entry)));
    }
    return out;
  }
  std::unique_ptr<device::Bindings> bind(const device::Kernel& kernel, std::span<const device::View> views) override {
    for (const device::View& view : views) {
      if (view.offset % facts_.offset_alignment != 0 || view.offset + view.size > view.buffer->size())
        throw Error(ErrorKind::kInternal, "a view lies outside its buffer");
    }
    return std::make_unique<FakeBindings>(kernel, views);
  }
  std::unique_ptr<device::Stream> make_stream() override { return std::make_unique<FakeStream>(); }
};

// Takes Metal's place, with settings as they are by default, until it goes.
class FakeMetal {
 public:
  FakeMetal() {
    fake_settings() = {};
    device::register_backend(device::Kind::kMetal, {[](const device::OpenOptions&) -> std::unique_ptr<device::Device> {
                                                      return std::make_unique<FakeDevice>();
                                                    },
                                                    [] { return std::vector<device::Facts>{FakeDevice::describe()}; }});
  }
  ~FakeMetal() { device::register_backend(device::Kind::kMetal, {}); }
  FakeMetal(const FakeMetal&) = delete;
  FakeMetal& operator=(const FakeMetal&) = delete;
};

}  // namespace cfmoe::test
