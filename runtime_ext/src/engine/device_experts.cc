// Waves of experts as dispatches.
#include "engine/device_experts.h"

#include <algorithm>
#include <limits>

#include "error.h"

namespace cfmoe {
namespace {

constexpr int32_t kEntryInts = 4;

}  // namespace

bool grid_of(const PlanKernel& kernel, std::span<const int32_t> scalars, std::array<uint32_t, 3>* groups) {
  SymbolValues values;
  values.scalars = scalars;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t count = kernel.grid[i].evaluate(values);
    if (count <= 0) return false;
    (*groups)[i] = static_cast<uint32_t>(std::min<int64_t>(count, std::numeric_limits<uint32_t>::max()));
  }
  return true;
}

DeviceExperts::DeviceExperts(Phase phase, device::Device& device, device::Recorder& recorder,
                             DeviceWorkspace& workspace, const DeviceKernel& gate_up, const DeviceKernel& down)
    : phase_(phase), device_(device), recorder_(recorder), workspace_(workspace), gate_up_(gate_up), down_(down) {}

void DeviceExperts::bind(const device::View& activation, const device::View& rows, const device::View& scratch) {
  activation_ = activation;
  rows_ = rows;
  scratch_ = scratch;
  // The host writes where kernels of the last step read.
  if (used_ > 0 && finished_ == recorder_.finished()) recorder_.finish();
  used_ = 0;
  // Decode's lists never change, and prefill sends them with its own.
  if (phase_ == Phase::kPrefill) lists_sent_ = false;
}

const DeviceSlab::Bound& DeviceExperts::bound_to(const Slab& slab) {
  const auto& memory = static_cast<const DeviceSlab&>(slab);
  const DeviceSlab::Key key{this, activation_.offset, rows_.offset, scratch_.offset};
  const auto found = memory.bound().find(key);
  if (found != memory.bound().end()) return found->second;
  const device::View slots{&memory.buffer(), 0, memory.size()};
  const device::View gate_up[] = {activation_, workspace_.rows_in, slots, scratch_, workspace_.work};
  const device::View down[] = {scratch_, workspace_.rows_out, slots, rows_, workspace_.work};
  DeviceSlab::Bound bound{device_.bind(*gate_up_.kernel, gate_up), device_.bind(*down_.kernel, down)};
  return memory.bound().emplace(key, std::move(bound)).first->second;
}

void DeviceExperts::run(std::span<const ExpertShare> wave, bool more) {
  if (wave.empty()) return;
  const auto capacity = static_cast<int32_t>(workspace_.work_entries.size() / kEntryInts);
  if (used_ + static_cast<int32_t>(wave.size()) > capacity)
    throw Error(ErrorKind::kInternal, "a layer has more experts than the work list holds");
  const int32_t wave_first = used_;
  launches_.clear();
  taken_.assign(wave.size(), false);
  for (size_t i = 0; i < wave.size(); ++i) {
    if (taken_[i]) continue;
    const Slab* slab = wave[i].view.slab;
    Launch launch{&bound_to(*slab), used_, 0, 0};
    for (size_t j = i; j < wave.size(); ++j) {
      const ExpertShare& share = wave[j];
      if (share.view.slab != slab) continue;
      taken_[j] = true;
      int32_t* entry = workspace_.work_entries.data() + int64_t{used_++} * kEntryInts;
      entry[0] = share.view.word_offset;
      entry[1] = share.list;
      entry[2] = share.count;
      entry[3] = share.scratch_row;
      launch.max_rows = std::max(launch.max_rows, share.count);
      ++launch.count;
    }
    launches_.push_back(launch);
  }
  if (!lists_sent_) {
    workspace_.push(recorder_, workspace_.rows_in);
    workspace_.push(recorder_, workspace_.rows_out);
    lists_sent_ = true;
  }
  device::View work = workspace_.work;
  work.offset += static_cast<uint64_t>(wave_first) * kEntryInts * sizeof(int32_t);
  work.size = wave.size() * kEntryInts * sizeof(int32_t);
  workspace_.push(recorder_, work);
  std::array<uint32_t, 3> groups;
  for (const bool second : {false, true}) {
    const DeviceKernel& kernel = second ? down_ : gate_up_;
    for (const Launch& launch : launches_) {
      const int32_t scalars[] = {launch.first, launch.count, launch.max_rows};
      if (!grid_of(*kernel.plan, scalars, &groups)) continue;
      recorder_.dispatch(second ? *launch.bound->down : *launch.bound->gate_up, scalars, groups);
    }
  }
  finished_ = recorder_.finished();
  if (more) recorder_.submit();
}

}  // namespace cfmoe
