// The device's side of a program's workspace, and the host's view of it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "device/device.h"
#include "device/recorder.h"
#include "store/aligned_buffer.h"

namespace cfmoe {

// Bytes of the largest program's workspace, and of what travels between host and device.
struct DeviceWorkspaceSizes {
  uint64_t programs = 0;
  uint64_t tokens = 0, hidden = 0, lists = 0, work = 0, ids = 0, weights = 0;  // what the host gives
  uint64_t results = 0;                                                        // what it gets: the largest
};

class DeviceWorkspace {
 public:
  // Zero-filled.
  DeviceWorkspace(device::Device& device, const DeviceWorkspaceSizes& sizes);
  static uint64_t bytes(const device::Facts& facts, const DeviceWorkspaceSizes& sizes);

  device::View programs, tokens, hidden, rows_in, rows_out, work;
  // Where kernels best read what the host writes between two submissions, and write what it reads; no buffer where a
  // place in `programs` is as good.
  device::View ids, weights, results;
  std::span<int32_t> list_memory;   // rows_in, then rows_out
  std::span<int32_t> work_entries;  // four numbers each: docs/artifact-format.md

  // The host's view of a part of the workspace: the memory itself, or where that is out of reach, a mirror, which push
  // and pull bring up to date on the device and on the host. What is pushed must not be in use.
  std::byte* host(const device::View& view) const;
  void push(device::Recorder& recorder, const device::View& view) const;
  void pull(device::Recorder& recorder, const device::View& view) const;

 private:
  std::unique_ptr<device::Buffer> device_, mirror_;   // the mirror only where kernels cannot reach the host's memory
  std::unique_ptr<device::Buffer> upload_, results_;  // only where they can, and the device has its own memory
  AlignedBuffer upload_mirror_;                       // reading `upload_` back would be slow
};

}  // namespace cfmoe
