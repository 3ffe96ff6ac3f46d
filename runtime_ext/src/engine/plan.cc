// The plan's reader: structs out of JSON, with every index, size and alignment checked.
#include "engine/plan.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <optional>
#include <utility>

#include "error.h"

namespace cfmoe {
namespace {

constexpr int64_t kMaxTensorBytes = int64_t{1} << 40;
constexpr int64_t kMaxWorkspaceBytes = int64_t{1} << 36;
constexpr size_t kMaxBuffers = 100'000, kMaxSteps = 100'000, kMaxArguments = 32, kMaxDimensions = 8;
constexpr int64_t kWorkspaceAlignment = 64;

struct DTypeFacts {
  const char* name;
  DType dtype;
  int64_t bytes;
};
constexpr std::array<DTypeFacts, 7> kDTypes = {{{"float32", DType::kFloat32, 4},
                                                {"float16", DType::kFloat16, 2},
                                                {"int32", DType::kInt32, 4},
                                                {"uint32", DType::kUInt32, 4},
                                                {"int8", DType::kInt8, 1},
                                                {"uint8", DType::kUInt8, 1},
                                                {"int64", DType::kInt64, 8}}};

DType parse_dtype(const JsonValue& json) {
  std::vector<std::string> names;
  for (const DTypeFacts& facts : kDTypes) names.emplace_back(facts.name);
  const std::string name = json.choice(names);
  return std::find_if(kDTypes.begin(), kDTypes.end(), [&](const DTypeFacts& facts) { return name == facts.name; })
      ->dtype;
}

std::string parse_kernel_name(const JsonValue& json) {
  std::string name = json.string();
  const auto word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  if (name.size() > 256 || !std::all_of(name.begin(), name.end(), word)) json.fail("is no kernel's name");
  return name;
}

Interval parse_bounds(const JsonValue& json) {
  if (json.array_size() != 2) json.fail("expected [lowest, highest]");
  constexpr int64_t kMax = int64_t{1} << 30;
  const int64_t low = json[0].integer(0, kMax);
  return {low, json[1].integer(low, kMax)};
}

Shape parse_shape(const JsonValue& json, const SymbolBounds& bounds, DType dtype) {
  Shape shape;
  int64_t bytes = dtype_bytes(dtype);
  for (const JsonValue& dimension : json.elements(kMaxDimensions)) {
    Expression expression = Expression::parse(dimension, bounds);
    if (expression.range().low < 0) dimension.fail("the dimension may be negative");
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(1, expression.range().high), &bytes) ||
        bytes > kMaxTensorBytes) {
      json.fail("the tensor is larger than 1 TiB");
    }
    shape.push_back(std::move(expression));
  }
  return shape;
}

uint64_t largest_bytes(DType dtype, const Shape& shape) {
  int64_t bytes = dtype_bytes(dtype);
  for (const Expression& dimension : shape) bytes *= dimension.range().high;
  return static_cast<uint64_t>(bytes);
}

class ProgramReader {
 public:
  ProgramReader(const Plan& plan, const SymbolBounds& bounds, const Manifest& manifest, const ArtifactIndex& index)
      : plan_(plan), bounds_(bounds), manifest_(manifest), index_(index), gpu_(!plan.kernels.empty()) {}

  // `input` and its dtype and last dimension, and the output's, are what the runtime hands over and takes.
  PlanProgram read(const JsonValue& json, const std::string& input, DType input_dtype, int64_t input_width,
                   int64_t output_width) {
    program_.workspace_bytes = static_cast<uint64_t>(json.at("workspace_bytes").integer(0, kMaxWorkspaceBytes));
    for (const JsonValue& buffer : json.at("buffers").elements(kMaxBuffers)) {
      program_.buffers.push_back(read_buffer(buffer, input, input_dtype, input_width));
    }
    program_.output = buffer_index(json.at("output"));
    expect(json.at("output"), program_.output, DType::kFloat32, [](int64_t n) { return n; }, output_width);
    if (program_.buffers[program_.output].kind != BufferKind::kWorkspace)
      json.at("output").fail("is no workspace buffer");
    for (const JsonValue& step : json.at("steps").elements(kMaxSteps)) program_.steps.push_back(read_step(step));
    return std::move(program_);
  }

 private:
  int32_t buffer_index(const JsonValue& json) const {
    return json.int32(0, static_cast<int32_t>(program_.buffers.size()) - 1);
  }

  PlanBuffer read_buffer(const JsonValue& json, const std::string& input, DType input_dtype,
                         int64_t input_width) const {
    PlanBuffer buffer;
    const std::string kind = json.at("kind").choice({"input", "weight", "k_cache", "v_cache", "workspace"});
    buffer.dtype = parse_dtype(json.at("dtype"));
    buffer.shape = parse_shape(json.at("shape"), bounds_, buffer.dtype);
    if (kind == "input") {
      buffer.kind = BufferKind::kInput;
      json.at("name").choice({input});
      if (buffer.dtype != input_dtype) json.at("dtype").fail(std::string("expected ") + dtype_name(input_dtype));
      expect_shape(json.at("shape"), buffer.shape, [](int64_t n) { return n; }, input_width);
    } else if (kind == "weight") {
      buffer.kind = BufferKind::kWeight;
      const std::string name = json.at("name").string();
      const auto& weights = index_.weights;
      const auto entry =
          std::find_if(weights.begin(), weights.end(), [&](const TensorEntry& e) { return e.name == name; });
      if (entry == weights.end()) json.at("name").fail("index.json has no tensor of this name");
      for (const Expression& dimension : buffer.shape) {
        if (dimension.range().low != dimension.range().high) json.at("shape").fail("a weight's shape is fixed");
      }
      if (entry->size != largest_bytes(buffer.dtype, buffer.shape)) {
        json.at("shape").fail("index.json says " + std::to_string(entry->size) + " bytes for this tensor");
      }
      buffer.weight = static_cast<int32_t>(entry - weights.begin());
    } else if (kind == "workspace") {
      const JsonValue offset = json.at("offset");
      buffer.offset = static_cast<uint64_t>(offset.integer(0, kMaxWorkspaceBytes));
      if (buffer.offset % kWorkspaceAlignment != 0) offset.fail("is no multiple of 64");
      if (buffer.offset + largest_bytes(buffer.dtype, buffer.shape) > program_.workspace_bytes) {
        offset.fail("the buffer may end behind workspace_bytes");
      }
    } else {
      buffer.kind = kind == "k_cache" ? BufferKind::kKCache : BufferKind::kVCache;
      buffer.layer = json.at("layer").int32(0, plan_.kv.layers - 1);
      if (buffer.dtype != plan_.kv.dtype) json.at("dtype").fail(std::string("expected ") + dtype_name(plan_.kv.dtype));
      // Its size is compared with the cache's where the context is known.
      for (const Expression& dimension : buffer.shape) {
        if (!dimension.fixed()) json.at("shape").fail("depends on the tokens of a run");
      }
    }
    return buffer;
  }

  // [rows(n), width] for every n; a width of 0 stands for the shape [rows(n)].
  template <typename Rows>
  void expect_shape(const JsonValue& json, const Shape& shape, Rows rows, int64_t width) const {
    const bool two = width > 0;
    if (shape.size() != (two ? 2U : 1U))
      json.fail(two ? "expected a tensor of 2 dimensions" : "expected a tensor of 1 dimension");
    if (two && (shape[1].range().low != width || shape[1].range().high != width)) {
      json.fail("the last dimension is not " + std::to_string(width));
    }
    if (shape[0].uses(Expression::Op::kPosition) || shape[0].uses(Expression::Op::kContext)) {
      json.fail("the first dimension depends on more than n");
    }
    for (int64_t n = bounds_.n.low; n <= bounds_.n.high; ++n) {
      if (shape[0].evaluate({n, 0, 0}) != rows(n))
        json.fail("the first dimension is wrong for n = " + std::to_string(n));
    }
  }

  template <typename Rows>
  void expect(const JsonValue& json, int32_t index, DType dtype, Rows rows, int64_t width) const {
    const PlanBuffer& buffer = program_.buffers[index];
    if (buffer.dtype != dtype) json.fail(std::string("expected a buffer of ") + dtype_name(dtype));
    expect_shape(json, buffer.shape, rows, width);
  }

  int32_t workspace_index(const JsonValue& json) const {
    const int32_t index = buffer_index(json);
    if (program_.buffers[index].kind != BufferKind::kWorkspace) json.fail("is no workspace buffer");
    return index;
  }

  RouterGroups read_groups(const JsonValue& json) const {
    const std::optional<JsonValue> count = json.find("groups");
    if (!count) return {};
    const ModelFacts& model = manifest_.model;
    RouterGroups groups;
    groups.count = count->int32(1, model.num_experts);
    if (model.num_experts % groups.count != 0) {
      count->fail("does not divide num_experts " + std::to_string(model.num_experts));
    }
    const JsonValue top = json.at("top_groups");
    groups.top = top.int32(1, groups.count);
    if (groups.top * (model.num_experts / groups.count) < model.top_k) top.fail("holds fewer than top_k experts");
    return groups;
  }

  // Buffers first, then scalars, as many as the kernel takes.
  void check_gpu_call(const JsonValue& json, const PlanStep& step) const {
    const auto found = plan_.kernels.find(step.kernel);
    if (found == plan_.kernels.end()) json.at("kernel").fail("kernels has no such entry");
    const device::KernelCode& code = found->second.code;
    const JsonValue arguments = json.at("args");
    if (step.arguments.size() != size_t{code.buffers} + code.scalars) {
      arguments.fail("the kernel takes " + std::to_string(code.buffers) + " buffers and " +
                     std::to_string(code.scalars) + " scalars");
    }
    for (size_t i = 0; i < step.arguments.size(); ++i) {
      const PlanArgument& argument = step.arguments[i];
      if ((argument.buffer >= 0) != (i < code.buffers)) arguments[i].fail("buffers come first, then scalars");
      if (argument.buffer >= 0) continue;
      const Interval range = argument.scalar.range();
      if (range.low < 0 || range.high > Expression::kMaxScalar)
        arguments[i].fail("may be less than 0 or more than " + std::to_string(Expression::kMaxScalar));
    }
  }

  PlanStep read_step(const JsonValue& json) const {
    const ModelFacts& model = manifest_.model;
    const auto tokens = [](int64_t n) { return n; };
    const int64_t top_k = model.top_k;
    PlanStep step;
    const std::string op = json.at("op").choice({"call", "route", "experts"});
    if (op == "call") {
      step.kernel = parse_kernel_name(json.at("kernel"));
      for (const JsonValue& argument : json.at("args").elements(kMaxArguments)) {
        PlanArgument& out = step.arguments.emplace_back();
        if (const auto buffer = argument.find("buffer")) {
          out.buffer = buffer_index(*buffer);
        } else {
          out.scalar = Expression::parse(argument.at("scalar"), bounds_);
        }
      }
      if (gpu_) check_gpu_call(json, step);
      return step;
    }
    step.layer = json.at("layer").int32(0, static_cast<int32_t>(model.moe_layers.size()) - 1);
    step.ids = workspace_index(json.at("ids"));
    expect(json.at("ids"), step.ids, DType::kInt32, tokens, top_k);
    if (op == "route") {
      step.op = StepOp::kRoute;
      step.logits = workspace_index(json.at("logits"));
      const PlanBuffer& logits = program_.buffers[step.logits];
      const int64_t padded = logits.shape.size() == 2 ? logits.shape[1].range().high : 0;
      if (padded < model.num_experts) json.at("logits").fail("holds fewer scores than there are experts");
      expect(json.at("logits"), step.logits, DType::kFloat32, tokens, padded);
      step.weights = workspace_index(json.at("weights"));
      expect(json.at("weights"), step.weights, DType::kFloat32, tokens, top_k);
      step.groups = read_groups(json);
      return step;
    }
    step.op = StepOp::kExperts;
    step.activation = workspace_index(json.at("activation"));
    const Shape& activation = program_.buffers[step.activation].shape;
    if (activation.empty()) json.at("activation").fail("expected the first dimension to be n");
    expect_shape(json.at("activation"), {activation[0]}, tokens, 0);
    step.rows = workspace_index(json.at("rows"));
    expect(json.at("rows"), step.rows, DType::kFloat32, [top_k](int64_t n) { return n * top_k; }, model.hidden_size);
    step.scratch = workspace_index(json.at("scratch"));
    const PlanBuffer& scratch = program_.buffers[step.scratch];
    const int64_t width = scratch.shape.size() == 2 ? scratch.shape[1].range().high : 0;
    if (width <= 0 || width * dtype_bytes(scratch.dtype) % kWorkspaceAlignment != 0) {
      json.at("scratch").fail("a row is no multiple of 64 bytes");
    }
    // A GPU computes all experts of a layer at once.
    const bool all = gpu_;
    expect_shape(
        json.at("scratch"), scratch.shape, [top_k, all](int64_t n) { return all ? n * top_k : std::max(n, top_k); },
        width);
    return step;
  }

  const Plan& plan_;
  const SymbolBounds& bounds_;
  const Manifest& manifest_;
  const ArtifactIndex& index_;
  const bool gpu_;
  PlanProgram program_;
};

PlanKv parse_kv(const JsonValue& json, const SymbolBounds& bounds, const Manifest& manifest) {
  PlanKv kv;
  kv.dtype = parse_dtype(json.at("dtype"));
  if (dtype_name(kv.dtype) != manifest.kv_dtype) json.at("dtype").fail("manifest.json says " + manifest.kv_dtype);
  kv.layers = json.at("layers").int32(manifest.model.num_layers, manifest.model.num_layers);
  for (const auto& [key, shape] : {std::pair{"k_shape", &kv.k_shape}, std::pair{"v_shape", &kv.v_shape}}) {
    *shape = parse_shape(json.at(key), bounds, kv.dtype);
    for (const Expression& dimension : *shape) {
      if (!dimension.fixed()) json.at(key).fail("depends on the tokens of a run");
    }
  }
  return kv;
}

ExpertKernelNames parse_expert_kernels(const JsonValue& json, int32_t outputs) {
  const int32_t tiles = (outputs + 31) / 32;
  return {parse_kernel_name(json.at("prefill")), parse_kernel_name(json.at("decode")),
          json.at("tiles").int32(tiles, tiles)};
}

std::array<uint32_t, 3> parse_extent(const JsonValue& json) {
  if (json.array_size() != 3) json.fail("expected three numbers");
  std::array<uint32_t, 3> out;
  for (size_t i = 0; i < 3; ++i) out[i] = static_cast<uint32_t>(json[i].int32(1, 1 << 16));
  return out;
}

std::map<std::string, PlanKernel> parse_kernels(const JsonValue& json) {
  constexpr size_t kMaxKernels = 4096;
  constexpr int64_t kMaxLibrary = int64_t{1} << 30;
  std::map<std::string, PlanKernel> kernels;
  const std::vector<std::string> names = json.keys();
  if (names.empty() || names.size() > kMaxKernels) json.fail("has " + std::to_string(names.size()) + " entries");
  for (const std::string& name : names) {
    const JsonValue entry = json.at(name);
    PlanKernel kernel;
    device::KernelCode& code = kernel.code;
    code.name = name;
    code.entry = parse_kernel_name(entry.at("entry"));
    if (entry.at("code").array_size() != 2) entry.at("code").fail("expected [offset, bytes]");
    code.offset = static_cast<uint64_t>(entry.at("code")[0].integer(0, kMaxLibrary));
    code.bytes = static_cast<uint64_t>(entry.at("code")[1].integer(1, kMaxLibrary));
    code.local = parse_extent(entry.at("local"));
    code.buffers = static_cast<uint32_t>(entry.at("buffers").int32(1, kMaxArguments));
    code.scalars = static_cast<uint32_t>(entry.at("scalars").int32(0, kMaxArguments));
    for (const JsonValue& index : entry.at("writes").elements(kMaxArguments))
      code.writes.push_back(static_cast<uint32_t>(index.int32(0, static_cast<int32_t>(code.buffers) - 1)));
    const JsonValue grid = entry.at("grid");
    if (grid.array_size() != 3) grid.fail("expected three expressions");
    for (size_t i = 0; i < 3; ++i) kernel.grid[i] = Expression::parse_grid(grid[i], code.scalars);
    kernels.emplace(name, std::move(kernel));
  }
  return kernels;
}

// Arguments of a GPU's expert kernels: docs/artifact-format.md.
void check_expert_kernels(const JsonValue& json, const Plan& plan) {
  constexpr uint32_t kBuffers = 5, kScalars = 3;
  for (const char* section : {"gate_up", "down"}) {
    for (const char* phase : {"prefill", "decode"}) {
      const JsonValue name = json.at(section).at(phase);
      const auto found = plan.kernels.find(name.string());
      if (found == plan.kernels.end()) name.fail("kernels has no such entry");
      if (found->second.code.buffers != kBuffers || found->second.code.scalars != kScalars)
        name.fail("the kernel does not take 5 buffers and 3 scalars");
    }
  }
  if (plan.experts.slab_dtypes.size() != 1) json.at("slab_dtypes").fail("expected one for a GPU");
}

}  // namespace

int64_t dtype_bytes(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].bytes; }
const char* dtype_name(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

uint64_t tensor_bytes(DType dtype, const Shape& shape, const SymbolValues& values) {
  uint64_t bytes = static_cast<uint64_t>(dtype_bytes(dtype));
  for (const Expression& dimension : shape) bytes *= static_cast<uint64_t>(dimension.evaluate(values));
  return bytes;
}

Plan parse_plan(std::string_view text, const std::string& path, const Manifest& manifest, const ArtifactIndex& index,
                bool gpu) {
  const JsonValue json = JsonValue::parse(text, path, "compile the artifact again");
  json.at("version").int32(1, 1);
  Plan plan;
  const JsonValue symbols = json.at("symbols");
  plan.bounds = {parse_bounds(symbols.at("n")), parse_bounds(symbols.at("position")),
                 parse_bounds(symbols.at("context"))};
  if (plan.bounds.n.low != 1 || plan.bounds.n.high != manifest.prefill_chunk) {
    symbols.at("n").fail("manifest.json says that a chunk has " + std::to_string(manifest.prefill_chunk) + " tokens");
  }
  if (plan.bounds.context.low <= 0) symbols.at("context").fail("the context may be empty");
  plan.hidden_size = json.at("hidden_size").int32(manifest.model.hidden_size, manifest.model.hidden_size);
  plan.kv = parse_kv(json.at("kv"), plan.bounds, manifest);

  const JsonValue experts = json.at("experts");
  plan.experts.gate_up = parse_expert_kernels(experts.at("gate_up"), manifest.model.expert_ffn_size);
  plan.experts.down = parse_expert_kernels(experts.at("down"), manifest.model.hidden_size);
  for (const JsonValue& dtype : experts.at("slab_dtypes").elements(4))
    plan.experts.slab_dtypes.push_back(parse_dtype(dtype));
  if (plan.experts.slab_dtypes.empty()) experts.at("slab_dtypes").fail("is empty");

  if (gpu) {
    plan.kernels = parse_kernels(json.at("kernels"));
    check_expert_kernels(experts, plan);
  }

  const JsonValue programs = json.at("programs");
  SymbolBounds single = plan.bounds;
  single.n = {1, 1};
  const int64_t hidden = plan.hidden_size;
  plan.prefill = ProgramReader(plan, plan.bounds, manifest, index)
                     .read(programs.at("prefill"), "tokens", DType::kInt32, 0, hidden);
  plan.decode =
      ProgramReader(plan, single, manifest, index).read(programs.at("decode"), "tokens", DType::kInt32, 0, hidden);
  plan.head = ProgramReader(plan, single, manifest, index)
                  .read(programs.at("head"), "hidden", DType::kFloat32, hidden, manifest.model.vocab_size);
  for (const PlanStep& step : plan.head.steps) {
    if (step.op != StepOp::kCall) programs.at("head").at("steps").fail("only calls are allowed here");
  }
  return plan;
}

}  // namespace cfmoe
