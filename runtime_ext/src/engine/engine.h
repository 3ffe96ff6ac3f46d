// An opened artifact: weights, kernels, expert cache, KV cache and workspace, all inside the budget.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "artifact/artifact_files.h"
#include "cache/expert_cache.h"
#include "engine/budget.h"
#include "engine/cpu_experts.h"
#include "engine/device_program.h"
#include "engine/device_slabs.h"
#include "engine/executor.h"
#include "engine/model_memory.h"
#include "engine/placement.h"
#include "engine/sampler.h"
#include "engine/turn_gate.h"
#include "trace/trace_recorder.h"

namespace cfmoe {

struct EngineOptions {
  uint64_t budget_bytes = 0;
  double expert_percent = 0.0;
  uint32_t context_size = 0;
  int32_t threads = 0;
  std::string io = "auto";
  std::string policy = kDefaultPolicy;
  bool log_events = false;
  bool record_trace = false;
  bool record_scores = false;  // in the trace; where the policy wants scores they are there anyway
  PlacementOptions placement;
  ProfileMode profile = ProfileMode::kOff;  // of what runs on a GPU
};

struct EngineMemory {
  BudgetPlan budget;
  FixedParts fixed;
  uint64_t smallest_budget = 0, largest_budget = 0;  // that work, and that are of use
  uint64_t pool_bytes = 0;
  uint64_t mapped_bytes = 0;
};

class Engine {
 public:
  // Throws cfmoe::Error where the artifact, an option or the budget is at fault.
  Engine(const std::string& artifact, const EngineOptions& options);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Runs tokens, 1 up to the chunk, at `position` and returns the hidden states that are asked for, [rows,
  // hidden_size], valid until the next run.
  std::span<const float> prefill(std::span<const int32_t> tokens, int64_t position, OutputRows rows);
  // Runs one token and returns its logits as head() does, or nothing.
  std::span<float> decode(int32_t token, int64_t position, bool logits);
  // Logits [vocabulary] of one hidden state [hidden_size]; valid, and the caller's to change, until the next run.
  std::span<float> head(std::span<const float> hidden);

  const ModelFacts& model() const { return artifact_.manifest.model; }
  int32_t chunk() const { return artifact_.manifest.prefill_chunk; }
  const ExpertIndex& experts() const { return artifact_.index.experts; }
  uint32_t context_size() const { return context_size_; }
  EngineMemory memory() const;  // from any thread
  PhaseMetrics cache_metrics(Phase phase) const;
  // Writes for each expert, [MoE layers * experts] as far as `out` goes, 1 if it is in memory and 0 otherwise.
  void residents(std::span<uint8_t> out) const;

  // Changes the budget, between calls or in the caller's code between two tokens; as when opening, 0 and 0 mean all
  // experts as far as memory goes. Throws cfmoe::Error, and changes nothing, where it is too small or a call is under
  // way.
  void set_budget(uint64_t budget_bytes, double expert_percent);
  // From now on conversations begin with the experts that are in memory, and free slots are filled in the background
  // with `experts` (layer * experts of a layer + expert), in this order: see ExpertCache::keep_warm. Between calls.
  void keep_warm(std::span<const uint32_t> experts);
  // Low memory: shrinks the budget to `budget_bytes`, or to the smallest that works if that is more; never grows it.
  // From any thread: at once, or before the next layer of the call under way.
  void trim(uint64_t budget_bytes);

  // A call that works with the engine. Throws cfmoe::Error where another one does.
  class Turn {
   public:
    explicit Turn(Engine& engine);
    ~Turn();
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    Engine& engine_;
  };
  const char* io() const { return io_mode_name(store_->mode()); }
  const std::string& policy() const { return policy_; }
  const std::string& warning() const { return warning_; }
  // "cpu", "vulkan" or "opencl"
  const std::string& device_of(Phase phase) const {
    return phase == Phase::kPrefill ? placement_.prefill : placement_.decode;
  }
  // Of the device that is no CPU; "" where both phases run on the CPU.
  const char* device_name() const { return placement_.device ? placement_.device->facts().name.c_str() : ""; }
  void add_warning(const std::string& warning);
  // Of what ran on a GPU since the engine was opened, or since reset_profiles(): "prefill", "decode", "head" (logits).
  std::vector<std::pair<std::string, const device::Profile*>> profiles() const;
  void reset_profiles();

  ExpertCache& cache() { return *cache_; }
  const TraceRecorder* recorder() const { return recorder_ ? &*recorder_ : nullptr; }
  ThreadPool& pool() { return *pool_; }
  TurnGate& gate() { return gate_; }
  std::span<Sampler::Candidate> candidates() { return candidates_; }
  std::span<uint8_t> seen() { return seen_; }  // [vocabulary], of the session
  std::atomic<bool>& cancelled() { return cancelled_; }
  std::atomic<bool>& has_session() { return has_session_; }

 private:
  void read_plans();
  void plan_memory(const EngineOptions& options);
  void load(const EngineOptions& options);
  void load_kernels();
  void load_device();
  void open_cache(const EngineOptions& options);
  void make_cpu_programs(int32_t* tokens, float* head_input);
  void make_device_programs();
  bool on_cpu(Phase phase) const { return device_of(phase) == "cpu"; }
  const Plan& plan_for(Phase phase) const { return on_cpu(phase) ? *cpu_plan_ : *gpu_plan_; }
  uint64_t programs_bytes(const std::optional<Plan>& plan, bool cpu) const;
  DeviceWorkspaceSizes device_workspace_sizes() const;
  uint64_t available() const;
  int32_t io_threads() const;
  Trace trace_header() const;
  std::vector<std::pair<std::string, DeviceProgram*>> device_programs() const;
  uint64_t budget_of(int32_t slots) const;
  BudgetPlan plan(BudgetRequest request) const;
  void resize(const BudgetPlan& plan);
  void apply_trim();
  std::span<const float> run(Program& program, int64_t n, int64_t position, OutputRows rows);
  std::span<float> logits();  // of the last run of head_

  // What is declared first is destroyed last: programs before the memory and the kernels that they name.
  Artifact artifact_;
  Placement placement_;
  std::optional<Plan> cpu_plan_, gpu_plan_;  // where a phase runs on such a device
  uint32_t context_size_ = 0;
  int64_t kv_rows_ = 0;
  FixedParts fixed_;
  BudgetPlan budget_;
  mutable std::mutex budget_mutex_;  // of budget_ and of the pool's size; a trim may come from another thread
  std::string policy_, warning_;
  ProfileMode profile_;

  std::optional<ModelMemory> memory_;
  AlignedBuffer workspace_;
  std::unique_ptr<device::Stream> stream_;
  std::optional<device::Recorder> device_recorder_;
  std::optional<DeviceWorkspace> device_workspace_;
  std::optional<DeviceKernels> device_kernels_;
  std::unique_ptr<DeviceSlabs> device_slabs_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<ExpertStore> store_;
  std::optional<TraceRecorder> recorder_;
  std::unique_ptr<ExpertCache> cache_;
  std::unique_ptr<KernelLibrary> kernels_;
  std::unique_ptr<Router> router_;
  ExpertLists lists_;
  std::unique_ptr<ExpertsStep> experts_step_;
  std::array<std::unique_ptr<CpuExperts>, 2> cpu_experts_;        // by phase
  std::array<std::unique_ptr<DeviceExperts>, 2> device_experts_;  // by phase
  std::unique_ptr<Program> prefill_, decode_, head_;
  std::span<float> hidden_;
  std::span<Sampler::Candidate> candidates_;
  std::span<uint8_t> seen_;
  std::atomic<bool> cancelled_{false}, has_session_{false};
  TurnGate gate_;
  std::atomic<uint64_t> trim_request_{0};  // bytes; 0: none
  std::exception_ptr trim_error_;          // of a trim at the end of a call; the next call throws it
  std::function<void()> between_layers_ = [this] { apply_trim(); };
};

// With placement.device "auto": on a GPU where the artifact and this machine have one that works, else on the CPU, with
// a warning that says why. Throws as the constructor does.
std::unique_ptr<Engine> open_engine(const std::string& artifact, EngineOptions options);

}  // namespace cfmoe
