// Records kernels and copies with barriers where one needs what another wrote, and nowhere else.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "device/device.h"
#include "device/profile.h"

namespace cfmoe::device {

class Recorder {
 public:
  explicit Recorder(Stream& stream) : stream_(stream) {}

  void dispatch(const Bindings& bindings, std::span<const int32_t> scalars, const std::array<uint32_t, 3>& groups);
  void copy(const View& from, const View& to);
  // Starts what was recorded.
  void submit();
  // Starts what was recorded and waits until everything has ended.
  void finish();

  // While the device works, what follows its next commands can be recorded already: deferred commands run behind those
  // that are recorded until submit_deferred(), whatever these write.
  bool can_defer() const { return stream_.can_defer() && (profile_ == nullptr || !profile_->timestamps()); }
  void begin_deferred();
  void end_deferred();
  // As submit(), where nothing was deferred.
  void submit_deferred();
  // Forgets what an error left.
  void drop_deferred();

  // How many times everything has ended.
  uint64_t finished() const { return finished_; }

  // Where costs are noted from now on, or null.
  void profile(Profile* profile) { profile_ = profile; }
  // The time until the next command is nobody's.
  void forget_time() { last_mark_ = 0; }

 private:
  void use(std::span<const Bindings::Use> uses);
  void begin_timing();
  void end_timing(const std::string& name);
  void take_times();

  Stream& stream_;
  uint64_t finished_ = 0;
  bool pending_ = false;                      // recorded or submitted, and not waited for
  std::vector<Bindings::Use> uses_;           // since the last barrier, or the last finish
  std::vector<Bindings::Use> deferred_uses_;  // of the deferred commands; while they are recorded, of the others
  bool deferring_ = false, deferred_ = false;
  Profile* profile_ = nullptr;
  std::vector<std::pair<Profile*, std::string>> marks_;  // what ended at each mark of the stream
  bool begun_ = false;                                   // the submission under way has a first mark
  double last_mark_ = 0;                                 // seconds of the device's clock; 0: none
};

}  // namespace cfmoe::device
