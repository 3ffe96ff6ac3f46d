// Computes the chosen experts of one MoE layer as the cache brings them into memory.
#pragma once

#include <dlpack/dlpack.h>

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/expert_cache.h"
#include "engine/kernel_library.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"

namespace cfmoe {

struct ExpertKernelSet {
  Kernel gate_up, down;
};

struct ExpertsStepFacts {
  ExpertKernelSet prefill, decode;
  int32_t gate_up_tiles = 0, down_tiles = 0;
  uint64_t record_bytes = 0;
  std::vector<DType> slab_dtypes;
  int32_t experts = 0, top_k = 0, chunk = 0;
};

// The tensors of one step of a program, bound for the run's number of tokens.
struct ExpertsTensors {
  DLTensor* activation = nullptr;    // [n, …]
  const int32_t* ids = nullptr;      // [n, top_k]
  DLTensor* rows = nullptr;          // [n * top_k, hidden]
  DLTensor* scratch = nullptr;       // [max(n, top_k), words]
  std::span<const uint16_t> scores;  // [n, experts], of the router; empty where nobody wants them
};

class ExpertsStep {
 public:
  // `lists` is list_bytes() of 64-byte aligned memory for row lists.
  ExpertsStep(const ExpertsStepFacts& facts, ExpertCache& cache, ThreadPool& pool, std::span<int32_t> lists);
  static uint64_t list_bytes(int32_t experts, int32_t top_k, int32_t chunk);

  // `cancelled` is looked at once per layer; throws cfmoe::Error (cancelled).
  void prefill(int32_t layer, const ExpertsTensors& tensors, int64_t n, uint64_t first_position,
               const std::atomic<bool>& cancelled);
  void decode(int32_t layer, const ExpertsTensors& tensors, uint64_t position);

 private:
  static constexpr int32_t kMaxArguments = 12;
  static constexpr int32_t kMaxSlabs = 4;

  // One expert of a wave: its arguments, complete but for the tiles.
  struct Work {
    DLTensor slabs[kMaxSlabs];
    int64_t slab_extents[kMaxSlabs];
    DLTensor rows_in, rows_out, scratch;
    int64_t rows_extent, scratch_shape[2];
    TVMFFIAny gate_up[kMaxArguments], down[kMaxArguments];
    int64_t cost_end;  // of one tile column, summed over the wave
    int64_t cost;
  };

  struct Group {  // the tokens of one expert
    int32_t begin = 0, count = 0;
  };

  void check_ids(std::span<const int32_t> ids) const;
  void group(const int32_t* ids, int64_t n, uint64_t first_position);
  void add(const ReadyExpert& ready, int32_t* rows_in, int32_t* rows_out, int64_t count, int64_t scratch_row,
           const ExpertsTensors& tensors);
  // Runs what add() gathered: all gate_up tiles, then all down tiles.
  void flush(const ExpertKernelSet& kernels);
  int run_tiles(const Kernel& kernel, bool down, int32_t tiles, int32_t thread, int32_t threads) const;

  ExpertsStepFacts facts_;
  ExpertCache& cache_;
  ThreadPool& pool_;
  std::span<int32_t> lists_;
  std::vector<Work> wave_;
  int32_t wave_size_ = 0;
  int32_t argument_count_;
  std::vector<Group> groups_;             // per expert
  std::vector<int32_t> chosen_;           // experts of the layer, ascending
  std::vector<uint64_t> last_positions_;  // of chosen_
};

}  // namespace cfmoe
