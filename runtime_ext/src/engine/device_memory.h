// The device's side of a program's workspace, and the host's view of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "device/device.h"
#include "device/recorder.h"

namespace cfmoe {

struct DeviceWorkspaceSizes {
  uint64_t programs = 0;  // bytes of the largest program
  uint64_t tokens = 0, hidden = 0, lists = 0, work = 0;
};

class DeviceWorkspace {
 public:
  // Zero-filled.
  DeviceWorkspace(device::Device& device, const DeviceWorkspaceSizes& sizes);
  static uint64_t bytes(const device::Facts& facts, const DeviceWorkspaceSizes& sizes);

  device::View programs, tokens, hidden, rows_in, rows_out, work;
  std::span<int32_t> list_memory;   // rows_in, then rows_out
  std::span<int32_t> work_entries;  // four numbers each: docs/artifact-format.md

  // The host's view of a part of the workspace: the memory itself, or where that is out of reach, a mirror, which push
  // and pull bring up to date on the device and on the host.
  std::byte* host(const device::View& view) const;
  void push(device::Recorder& recorder, const device::View& view) const;
  void pull(device::Recorder& recorder, const device::View& view) const;

 private:
  std::unique_ptr<device::Buffer> device_, mirror_;
};

}  // namespace cfmoe
