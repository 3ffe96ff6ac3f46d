// Hazards by byte range: a read after a write, a write after a read, a write after a write.
#include "device/recorder.h"

#include <algorithm>

namespace cfmoe::device {
namespace {

bool conflict(const Bindings::Use& a, const Bindings::Use& b) {
  return (a.write || b.write) && a.view.buffer == b.view.buffer && a.view.offset < b.view.offset + b.view.size &&
         b.view.offset < a.view.offset + a.view.size;
}

}  // namespace

void Recorder::use(std::span<const Bindings::Use> uses) {
  const bool needed = std::any_of(uses.begin(), uses.end(), [this](const Bindings::Use& next) {
    return std::any_of(uses_.begin(), uses_.end(), [&next](const Bindings::Use& last) { return conflict(last, next); });
  });
  pending_ = true;
  if (needed) {
    stream_.barrier();
    uses_.clear();
  }
  uses_.insert(uses_.end(), uses.begin(), uses.end());
}

void Recorder::dispatch(const Bindings& bindings, std::span<const int32_t> scalars,
                        const std::array<uint32_t, 3>& groups) {
  use(bindings.uses());
  stream_.dispatch(bindings, scalars, groups);
}

void Recorder::copy(const View& from, const View& to) {
  const Bindings::Use uses[] = {{from, false}, {to, true}};
  use(uses);
  stream_.copy(from, to);
}

void Recorder::finish() {
  if (pending_) {
    stream_.submit();
    stream_.wait();
  }
  pending_ = false;
  uses_.clear();
  ++finished_;
}

}  // namespace cfmoe::device
