// plan.json: the ahead-of-time program of a target, checked so that running it stays inside its buffers.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/index.h"
#include "artifact/manifest.h"
#include "device/device.h"
#include "engine/expression.h"
#include "engine/router.h"

namespace cfmoe {

enum class DType : uint8_t { kFloat32, kFloat16, kInt32, kUInt32, kInt8, kUInt8, kInt64 };
int64_t dtype_bytes(DType dtype);
const char* dtype_name(DType dtype);

using Shape = std::vector<Expression>;

enum class BufferKind : uint8_t { kInput, kWeight, kKCache, kVCache, kWorkspace };

struct PlanBuffer {
  BufferKind kind = BufferKind::kWorkspace;
  DType dtype = DType::kFloat32;
  Shape shape;
  int32_t weight = -1;  // kWeight: place in ArtifactIndex::weights
  int32_t layer = -1;   // kKCache, kVCache
  uint64_t offset = 0;  // kWorkspace: bytes, a multiple of 64
};

struct PlanArgument {
  int32_t buffer = -1;  // or, if negative, the scalar
  Expression scalar;
};

enum class StepOp : uint8_t { kCall, kRoute, kExperts };

struct PlanStep {
  StepOp op = StepOp::kCall;
  std::string kernel;                                // kCall
  std::vector<PlanArgument> arguments;               // kCall
  int32_t layer = -1;                                // kRoute, kExperts: MoE layer
  int32_t ids = -1;                                  // kRoute, kExperts: buffers
  int32_t logits = -1, weights = -1;                 // kRoute
  RouterGroups groups;                               // kRoute
  int32_t activation = -1, rows = -1, scratch = -1;  // kExperts
};

struct PlanProgram {
  uint64_t workspace_bytes = 0;
  std::vector<PlanBuffer> buffers;
  int32_t output = -1;
  std::vector<PlanStep> steps;
};

struct PlanKv {
  DType dtype = DType::kFloat16;
  int32_t layers = 0;
  Shape k_shape, v_shape;
};

struct ExpertKernelNames {
  std::string prefill, decode;
  int32_t tiles = 0;
};

struct PlanExperts {
  ExpertKernelNames gate_up, down;
  std::vector<DType> slab_dtypes;
};

// A kernel of a GPU's library, and how many workgroups a call takes.
struct PlanKernel {
  device::KernelCode code;
  std::array<Expression, 3> grid;  // over the call's scalars
};

struct Plan {
  SymbolBounds bounds;
  std::map<std::string, PlanKernel> kernels;  // of a GPU's plan; empty for a CPU's
  int32_t hidden_size = 0;
  PlanKv kv;
  PlanExperts experts;
  PlanProgram prefill, decode, head;
};

// Throws cfmoe::Error naming `path` and the field. `gpu` says for what the plan must be.
Plan parse_plan(std::string_view text, const std::string& path, const Manifest& manifest, const ArtifactIndex& index,
                bool gpu = false);

// Bytes of a compact tensor for these values.
uint64_t tensor_bytes(DType dtype, const Shape& shape, const SymbolValues& values);

}  // namespace cfmoe
