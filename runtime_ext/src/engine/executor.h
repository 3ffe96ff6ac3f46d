// A program of the plan, bound to memory once and run many times.
#pragma once

#include <dlpack/dlpack.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "cache/expert_cache.h"
#include "engine/experts_step.h"
#include "engine/kernel_library.h"
#include "engine/kv_cache.h"
#include "engine/plan.h"
#include "engine/router.h"

namespace cfmoe {

// Everything that a program reads and writes; it must outlive the program.
struct ProgramMemory {
  std::vector<void*> weights;  // by place in the index
  const KvCache* kv = nullptr;
  char* workspace = nullptr;
  void* input = nullptr;  // 64-byte aligned
  int64_t context = 0;
};

struct ProgramServices {
  KernelLibrary* kernels = nullptr;
  Router* router = nullptr;
  ExpertsStep* experts = nullptr;
  const std::atomic<bool>* cancelled = nullptr;
  const std::function<void()>* between_layers = nullptr;  // called while no expert is in use
};

class BoundProgram {
 public:
  BoundProgram(const PlanProgram& program, Phase phase, const ProgramMemory& memory, const ProgramServices& services);
  BoundProgram(const BoundProgram&) = delete;
  BoundProgram& operator=(const BoundProgram&) = delete;

  // `n` tokens, the first at `position`; both within the plan's bounds. The caller's thread runs the serial parts; see
  // PoolScope.
  void run(int64_t n, int64_t position);
  const DLTensor& output() const { return *output_; }

 private:
  struct Step {
    StepOp op = StepOp::kCall;
    Kernel kernel;
    TVMFFIAny* arguments = nullptr;
    int32_t argument_count = 0;
    int32_t layer = -1;
    DLTensor *ids = nullptr, *logits = nullptr, *weights = nullptr, *activation = nullptr, *rows = nullptr,
             *scratch = nullptr;
    RouterGroups groups;
  };
  void* locate(const PlanBuffer& buffer, const ProgramMemory& memory) const;
  // Writes the expression's value to `target`, now and before each run that may change it.
  void bind(const Expression& expression, int64_t* target);

  Phase phase_;
  ProgramServices services_;
  SymbolValues values_;
  std::vector<DLTensor> tensors_;
  std::vector<int64_t> shapes_;
  std::vector<TVMFFIAny> arguments_;
  std::vector<Step> steps_;
  std::vector<std::pair<int64_t*, Expression>> by_n_, by_position_;  // what changes with n alone, and the rest
  DLTensor* output_ = nullptr;
};

}  // namespace cfmoe
