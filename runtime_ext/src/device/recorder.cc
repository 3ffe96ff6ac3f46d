// Hazards by byte range: a read after a write, a write after a read, a write after a write.
#include "device/recorder.h"

#include <algorithm>
#include <utility>

namespace cfmoe::device {
namespace {

constexpr char kIdle[] = "(idle)", kCopy[] = "(copy)";

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
  begin_timing();
  {
    const Profile::Scope scope(profile_, HostPart::kRecord);
    use(bindings.uses());
    stream_.dispatch(bindings, scalars, groups);
  }
  end_timing(bindings.kernel().code().name);
}

void Recorder::copy(const View& from, const View& to) {
  begin_timing();
  {
    const Profile::Scope scope(profile_, HostPart::kRecord);
    const Bindings::Use uses[] = {{from, false}, {to, true}};
    use(uses);
    stream_.copy(from, to);
  }
  end_timing(kCopy);
}

void Recorder::submit() {
  const Profile::Scope scope(profile_, HostPart::kSubmit);
  stream_.submit();
  begun_ = false;
}

void Recorder::begin_deferred() {
  const Profile::Scope scope(profile_, HostPart::kRecord);
  deferred_uses_.clear();
  std::swap(uses_, deferred_uses_);
  deferring_ = true;
  stream_.defer(true);
  // Of what runs before, nothing is known yet.
  stream_.barrier();
}

void Recorder::end_deferred() {
  stream_.defer(false);
  std::swap(uses_, deferred_uses_);
  deferring_ = false;
  deferred_ = true;
}

void Recorder::submit_deferred() {
  if (!deferred_) {
    submit();
    return;
  }
  const Profile::Scope scope(profile_, HostPart::kSubmit);
  stream_.submit_deferred();
  deferred_ = false;
  pending_ = true;
  // They begin with a barrier.
  uses_ = deferred_uses_;
}

void Recorder::drop_deferred() {
  if (deferring_) end_deferred();
  deferred_ = false;
}

void Recorder::finish() {
  if (pending_) {
    submit();
    {
      const Profile::Scope scope(profile_, HostPart::kWait);
      stream_.wait();
    }
    take_times();
  }
  pending_ = false;
  uses_.clear();
  ++finished_;
}

// Kernels that nothing orders may run side by side: then the later ones have what they took longer.
void Recorder::begin_timing() {
  if (profile_ == nullptr || !profile_->timestamps()) return;
  if (marks_.size() + 2 > Stream::kMaxMarks) finish();
  if (begun_) return;
  begun_ = true;
  stream_.mark();
  marks_.emplace_back(profile_, kIdle);
}

void Recorder::end_timing(const std::string& name) {
  if (profile_ == nullptr || !profile_->timestamps()) return;
  stream_.mark();
  marks_.emplace_back(profile_, name);
}

void Recorder::take_times() {
  if (marks_.empty()) return;
  const std::vector<double> times = stream_.marks();
  for (size_t i = 0; i < times.size(); ++i) {
    if (last_mark_ > 0) marks_[i].first->add_kernel(marks_[i].second, std::max(times[i] - last_mark_, 0.0));
    last_mark_ = times[i];
  }
  marks_.clear();
}

}  // namespace cfmoe::device
