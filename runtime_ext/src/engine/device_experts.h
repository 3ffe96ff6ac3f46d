// Experts on a GPU: one dispatch for all experts of a wave that lie in the same slab.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "device/device.h"
#include "device/recorder.h"
#include "engine/device_memory.h"
#include "engine/device_slabs.h"
#include "engine/expert_compute.h"
#include "engine/experts_step.h"
#include "engine/plan.h"

namespace cfmoe {

// A kernel of the plan that has been loaded.
struct DeviceKernel {
  const device::Kernel* kernel = nullptr;
  const PlanKernel* plan = nullptr;
};

class DeviceExperts final : public ExpertCompute {
 public:
  DeviceExperts(Phase phase, device::Device& device, device::Recorder& recorder, DeviceWorkspace& workspace,
                const DeviceKernel& gate_up, const DeviceKernel& down);

  // The step whose waves follow: what the experts read, [n, …], what they write, [n * top_k, hidden], and what lies
  // between, [scratch_rows, words].
  void bind(const device::View& activation, const device::View& rows, const device::View& scratch);
  // Records the wave; with `more`, starts it too.
  void run(std::span<const ExpertShare> wave, bool more) override;

 private:
  const DeviceSlab::Bound& bound_to(const Slab& slab);

  Phase phase_;
  device::Device& device_;
  device::Recorder& recorder_;
  DeviceWorkspace& workspace_;
  DeviceKernel gate_up_, down_;
  device::View activation_, rows_, scratch_;
  int32_t used_ = 0;  // work entries of the step so far
  uint64_t finished_ = 0;
  bool lists_sent_ = false;
  struct Launch {
    const DeviceSlab::Bound* bound;
    int32_t first, count, max_rows;
  };
  std::vector<Launch> launches_;
  std::vector<bool> taken_;
};

// Workgroups of a call with these scalars; false where there is nothing to do.
bool grid_of(const PlanKernel& kernel, std::span<const int32_t> scalars, std::array<uint32_t, 3>* groups);

}  // namespace cfmoe
