// Where the time of a program goes: kernels by the device's clock, the host's parts by its own.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace cfmoe::device {

enum class HostPart : uint8_t {
  kOther,    // of the program, and nothing of the following
  kRecord,   // recording commands
  kSubmit,   // handing them to the driver
  kWait,     // for the device
  kRoute,    // choosing experts
  kExperts,  // the cache's bookkeeping, work lists, and waiting for reads
};
constexpr size_t kHostParts = 6;
const char* host_part_name(HostPart part);

struct ProfileCost {
  uint64_t calls = 0;
  double seconds = 0;
};

class Profile {
 public:
  // With `timestamps` kernels are timed, which slows all else down.
  explicit Profile(bool timestamps) : timestamps_(timestamps) {}
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;

  bool timestamps() const { return timestamps_; }
  void reset() {
    kernels_.clear();
    host_ = {};
  }
  // A copy, or time in which the device waited for the host, goes by a name in brackets.
  void add_kernel(const std::string& name, double seconds) {
    ProfileCost& cost = kernels_[name];
    ++cost.calls;
    cost.seconds += seconds;
  }
  const std::map<std::string, ProfileCost>& kernels() const { return kernels_; }
  const ProfileCost& host(HostPart part) const { return host_[static_cast<size_t>(part)]; }
  // Of the program.
  uint64_t runs() const { return host(HostPart::kOther).calls; }

  // The time until its end belongs to `part`, but for what scopes within it take. Without a profile it costs nothing.
  class Scope {
   public:
    Scope(Profile* profile, HostPart part) : profile_(profile) {
      if (profile_ == nullptr) return;
      outer_ = profile_->part_;
      profile_->turn_to(part);
      ++profile_->host_[static_cast<size_t>(part)].calls;
    }
    ~Scope() {
      if (profile_ != nullptr) profile_->turn_to(outer_);
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Profile* profile_;
    HostPart outer_ = HostPart::kOther;
  };

  // A run begins; a scope of HostPart::kOther follows.
  void start() {
    part_ = HostPart::kOther;
    last_ = std::chrono::steady_clock::now();
  }

 private:
  void turn_to(HostPart part) {
    const auto now = std::chrono::steady_clock::now();
    host_[static_cast<size_t>(part_)].seconds += std::chrono::duration<double>(now - last_).count();
    last_ = now;
    part_ = part;
  }

  bool timestamps_;
  std::map<std::string, ProfileCost> kernels_;
  std::array<ProfileCost, kHostParts> host_{};
  HostPart part_ = HostPart::kOther;
  std::chrono::steady_clock::time_point last_{};
};

}  // namespace cfmoe::device
