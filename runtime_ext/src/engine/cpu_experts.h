// Experts on the CPU: the tiles of all experts of a wave are shared out among the threads.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>
#include <span>
#include <vector>

#include "engine/expert_compute.h"
#include "engine/experts_step.h"
#include "engine/kernel_library.h"
#include "engine/plan.h"
#include "engine/thread_pool.h"

namespace cfmoe {

struct ExpertKernelSet {
  Kernel gate_up, down;
};

struct CpuExpertsFacts {
  int32_t gate_up_tiles = 0, down_tiles = 0;
  uint64_t record_bytes = 0;
  std::vector<DType> slab_dtypes;
  int32_t experts = 0;
};

class CpuExperts final : public ExpertCompute {
 public:
  CpuExperts(const CpuExpertsFacts& facts, const ExpertKernelSet& kernels, ThreadPool& pool, const ExpertLists& lists);

  // The tensors of the step whose waves follow, bound for the run's number of tokens: activation [n, …],
  // rows [n * top_k, hidden], scratch [scratch_rows, words].
  void bind(DLTensor* activation, DLTensor* rows, DLTensor* scratch) {
    activation_ = activation;
    rows_ = rows;
    scratch_ = scratch;
  }
  // All gate_up tiles of the wave, then all down tiles.
  void run(std::span<const ExpertShare> wave, bool more) override;

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

  void add(const ExpertShare& share);
  int run_tiles(const Kernel& kernel, bool down, int32_t tiles, int32_t thread, int32_t threads) const;

  CpuExpertsFacts facts_;
  ExpertKernelSet kernels_;
  ThreadPool& pool_;
  ExpertLists lists_;
  DLTensor *activation_ = nullptr, *rows_ = nullptr, *scratch_ = nullptr;
  std::vector<Work> wave_;
  int32_t wave_size_ = 0;
  int32_t argument_count_;
};

}  // namespace cfmoe
