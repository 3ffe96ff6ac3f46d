// A program of a CPU's plan: argument arrays that kernels are called with.
#pragma once

#include <dlpack/dlpack.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "engine/cpu_experts.h"
#include "engine/experts_step.h"
#include "engine/kernel_library.h"
#include "engine/model_memory.h"
#include "engine/plan.h"
#include "engine/program.h"
#include "engine/router.h"

namespace cfmoe {

// Everything that a program reads and writes; it must outlive the program.
struct ProgramMemory {
  const ModelMemory* model = nullptr;
  char* workspace = nullptr;
  void* input = nullptr;  // 64-byte aligned
  int64_t context = 0;
};

struct ProgramServices {
  KernelLibrary* kernels = nullptr;
  Router* router = nullptr;
  ExpertsStep* experts = nullptr;
  CpuExperts* compute = nullptr;
  const std::atomic<bool>* cancelled = nullptr;
  const std::function<void()>* between_layers = nullptr;  // called while no expert is in use
};

class BoundProgram final : public Program {
 public:
  BoundProgram(const PlanProgram& program, Phase phase, const ProgramMemory& memory, const ProgramServices& services);
  BoundProgram(const BoundProgram&) = delete;
  BoundProgram& operator=(const BoundProgram&) = delete;

  void* input() override { return input_; }
  void run(int64_t n, int64_t position, OutputRows rows) override;
  void* output() override;

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
  void* input_;
  ProgramServices services_;
  SymbolValues values_;
  std::vector<DLTensor> tensors_;
  std::vector<int64_t> shapes_;
  std::vector<TVMFFIAny> arguments_;
  std::vector<Step> steps_;
  std::vector<std::pair<int64_t*, Expression>> by_n_, by_position_;  // what changes with n alone, and the rest
  DLTensor* output_ = nullptr;
  OutputRows rows_ = OutputRows::kAll;
};

}  // namespace cfmoe
