// An opened artifact: weights, kernels, expert cache, KV cache and workspace, all inside the budget.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "artifact/artifact_files.h"
#include "cache/expert_cache.h"
#include "engine/budget.h"
#include "engine/executor.h"
#include "engine/sampler.h"
#include "store/weights_file.h"
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
};

struct EngineMemory {
  BudgetPlan budget;
  FixedParts fixed;
  uint64_t pool_bytes = 0;
  uint64_t mapped_bytes = 0;
};

class Engine {
 public:
  // Throws cfmoe::Error where the artifact, an option or the budget is at fault.
  Engine(const std::string& artifact, const EngineOptions& options);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Runs tokens (1 up to the chunk for prefill) at `position` and returns their hidden states [n, hidden_size], valid
  // until the next run.
  std::span<const float> prefill(std::span<const int32_t> tokens, int64_t position);
  std::span<const float> decode(int32_t token, int64_t position);
  // Logits [vocabulary] of one hidden state [hidden_size]; valid, and the caller's to change, until the next run.
  std::span<float> head(std::span<const float> hidden);

  const ModelFacts& model() const { return artifact_.manifest.model; }
  int32_t chunk() const { return artifact_.manifest.prefill_chunk; }
  const ExpertIndex& experts() const { return artifact_.index.experts; }
  uint32_t context_size() const { return context_size_; }
  EngineMemory memory() const;
  const char* io() const { return io_mode_name(store_->mode()); }
  const std::string& policy() const { return policy_; }
  const std::string& warning() const { return warning_; }

  ExpertCache& cache() { return *cache_; }
  const TraceRecorder* recorder() const { return recorder_ ? &*recorder_ : nullptr; }
  ThreadPool& pool() { return *pool_; }
  std::span<Sampler::Candidate> candidates() { return candidates_; }
  std::span<uint8_t> seen() { return seen_; }  // [vocabulary], of the session
  std::atomic<bool>& cancelled() { return cancelled_; }
  std::atomic<bool>& has_session() { return has_session_; }

 private:
  void plan_memory(const EngineOptions& options);
  void load(const EngineOptions& options);
  Trace trace_header() const;
  std::span<const float> run(BoundProgram& program, int64_t n, int64_t position);

  Artifact artifact_;
  Plan plan_;
  uint32_t context_size_ = 0;
  int64_t kv_rows_ = 0;
  FixedParts fixed_;
  BudgetPlan budget_;
  std::string policy_, warning_;

  LoadedWeights weights_;
  std::optional<KvCache> kv_;
  AlignedBuffer workspace_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<ExpertStore> store_;
  std::optional<TraceRecorder> recorder_;
  std::unique_ptr<ExpertCache> cache_;
  std::unique_ptr<KernelLibrary> kernels_;
  std::unique_ptr<Router> router_;
  std::unique_ptr<ExpertsStep> experts_step_;
  std::unique_ptr<BoundProgram> prefill_, decode_, head_;
  std::span<int32_t> tokens_;
  std::span<float> hidden_, head_input_;
  std::span<Sampler::Candidate> candidates_;
  std::span<uint8_t> seen_;
  std::atomic<bool> cancelled_{false}, has_session_{false};
};

}  // namespace cfmoe
