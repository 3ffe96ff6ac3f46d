// Records kernels and copies with barriers where one needs what another wrote, and nowhere else.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"

namespace cfmoe::device {

class Recorder {
 public:
  explicit Recorder(Stream& stream) : stream_(stream) {}

  void dispatch(const Bindings& bindings, std::span<const int32_t> scalars, const std::array<uint32_t, 3>& groups);
  void copy(const View& from, const View& to);
  // Starts what was recorded.
  void submit() { stream_.submit(); }
  // Starts what was recorded and waits until everything has ended.
  void finish();
  // How many times everything has ended.
  uint64_t finished() const { return finished_; }

 private:
  void use(std::span<const Bindings::Use> uses);

  Stream& stream_;
  uint64_t finished_ = 0;
  bool pending_ = false;             // recorded or submitted, and not waited for
  std::vector<Bindings::Use> uses_;  // since the last barrier, or the last finish
};

}  // namespace cfmoe::device
