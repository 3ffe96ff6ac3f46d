// Has the chosen experts of one MoE layer computed as the cache brings them into memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "cache/expert_cache.h"
#include "engine/expert_compute.h"

namespace cfmoe {

// Two lists of rows in one block of memory: of the activation, which experts read, and of the output, which they write.
struct ExpertLists {
  std::span<int32_t> rows_in, rows_out;

  ExpertLists() = default;
  // `memory` has bytes() bytes and the alignment that kernels want.
  ExpertLists(std::span<int32_t> memory)
      : rows_in(memory.first(memory.size() / 2)), rows_out(memory.subspan(memory.size() / 2)) {}
  static uint64_t bytes(int32_t experts, int32_t top_k, int32_t chunk);
};

struct ExpertsStepFacts {
  int32_t experts = 0, top_k = 0, chunk = 0;
};

// One step of a program, bound for the run's number of tokens.
struct ExpertsCall {
  const int32_t* ids = nullptr;      // [n, top_k]
  std::span<const uint16_t> scores;  // [n, experts], of the router; empty where nobody wants them
  int64_t scratch_rows = 0;          // for intermediate rows, at least n and top_k
  ExpertCompute* compute = nullptr;
};

class ExpertsStep {
 public:
  ExpertsStep(const ExpertsStepFacts& facts, ExpertCache& cache, const ExpertLists& lists);

  // `cancelled` is looked at once per layer; throws cfmoe::Error (cancelled).
  void prefill(int32_t layer, const ExpertsCall& call, int64_t n, uint64_t first_position,
               const std::atomic<bool>& cancelled);
  void decode(int32_t layer, const ExpertsCall& call, uint64_t position);

 private:
  struct Group {  // the tokens of one expert
    int32_t begin = 0, count = 0;
  };

  void check_ids(std::span<const int32_t> ids) const;
  void group(const int32_t* ids, int64_t n, uint64_t first_position);

  ExpertsStepFacts facts_;
  ExpertCache& cache_;
  ExpertLists lists_;
  std::vector<ExpertShare> wave_;
  std::vector<Group> groups_;             // per expert
  std::vector<int32_t> chosen_;           // experts of the layer, ascending
  std::vector<uint64_t> last_positions_;  // of chosen_
};

}  // namespace cfmoe
