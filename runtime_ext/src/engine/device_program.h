// A program of a GPU's plan: what lies between two steps of the host goes to the device in one submission.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device/device.h"
#include "device/profile.h"
#include "device/recorder.h"
#include "engine/device_experts.h"
#include "engine/device_memory.h"
#include "engine/model_memory.h"
#include "engine/plan.h"
#include "engine/program.h"
#include "engine/router.h"

namespace cfmoe {

// The kernels of a plan, on a device.
class DeviceKernels {
 public:
  // Compiles them all; throws cfmoe::Error naming the kernel.
  DeviceKernels(device::Device& device, const Plan& plan, std::string_view library);
  DeviceKernel get(const std::string& name) const;

 private:
  std::map<std::string, DeviceKernel> kernels_;
  std::vector<std::unique_ptr<device::Kernel>> loaded_;
};

// What is measured while programs run: nothing, the host's parts, or the kernels too, which slows all else down.
enum class ProfileMode : uint8_t { kOff, kHost, kKernels };

// Everything that a program works with; it must outlive the program.
struct DeviceServices {
  device::Device* device = nullptr;
  device::Recorder* recorder = nullptr;
  const DeviceKernels* kernels = nullptr;
  const ModelMemory* model = nullptr;
  DeviceWorkspace* workspace = nullptr;
  Router* router = nullptr;
  ExpertsStep* experts = nullptr;
  DeviceExperts* compute = nullptr;  // null for a program without experts
  const std::atomic<bool>* cancelled = nullptr;
  const std::function<void()>* between_layers = nullptr;  // called while no expert is in use
  ProfileMode profile = ProfileMode::kOff;
};

// Bytes of what programs of the plan give to the host and get from it: ids, weights and results alone.
DeviceWorkspaceSizes meeting_sizes(const Plan& plan);

class DeviceProgram final : public Program {
 public:
  DeviceProgram(const PlanProgram& program, Phase phase, const Plan& plan, const device::View& input, int64_t context,
                const DeviceServices& services);
  DeviceProgram(const DeviceProgram&) = delete;
  DeviceProgram& operator=(const DeviceProgram&) = delete;

  void* input() override { return services_.workspace->host(input_); }
  void run(int64_t n, int64_t position, OutputRows rows) override { run(n, position, rows, nullptr); }
  // Runs `next`, a program without steps of the host, over the output too, in the same submission.
  void run(int64_t n, int64_t position, OutputRows rows, DeviceProgram* next);
  void* output() override { return output_; }
  device::Profile* profile() const { return profile_.get(); }  // null where nothing is measured

 private:
  struct Step {
    DeviceKernel kernel;
    std::unique_ptr<device::Bindings> bindings;
    std::vector<int32_t> scalars;
    bool ids_used = false;  // route: a kernel reads the ids
  };
  device::View place(int32_t index) const;
  // Places of what travels between host and device, by buffer; none where memory is shared.
  std::map<int32_t, device::View> meeting_places() const;
  // The part of a buffer that holds this run's tokens.
  device::View now(int32_t buffer) const;
  // Records calls from a step on; returns the next step that is none.
  size_t record_calls(size_t step);
  // Records calls up to the next step of the host, and what that step or the end of the run needs.
  size_t record_segment(size_t step);
  void record_end();
  // The first such step after a step kRoute and before another; 0: none.
  size_t experts_after(size_t route) const;
  void call(const PlanStep& plan, Step& step);
  void route(const PlanStep& plan, const Step& step);
  void run_experts(const PlanStep& plan);

  const PlanProgram& program_;
  Phase phase_;
  device::View input_;
  DeviceServices services_;
  std::unique_ptr<device::Profile> profile_;
  SymbolBounds bounds_;
  SymbolValues values_;
  std::map<int32_t, device::View> meeting_places_;
  std::vector<device::View> buffers_;  // by place in the plan, of their largest size
  std::vector<Step> steps_;            // one per step of the plan
  OutputRows rows_ = OutputRows::kAll;
  DeviceProgram* next_ = nullptr;
  void* output_ = nullptr;
};

}  // namespace cfmoe
