// The executor: argument arrays are built once; a run evaluates what depends on the tokens and calls kernel after
// kernel.
#include "engine/executor.h"

#include "engine/dl_tensor.h"

namespace cfmoe {

BoundProgram::BoundProgram(const PlanProgram& program, Phase phase, const ProgramMemory& memory,
                           const ProgramServices& services)
    : phase_(phase), input_(memory.input), services_(services), values_{1, 0, memory.context} {
  size_t dimensions = 0, arguments = 0;
  for (const PlanBuffer& buffer : program.buffers) dimensions += buffer.shape.size();
  for (const PlanStep& step : program.steps) arguments += step.arguments.size();
  // Sized once: kernels are given addresses inside.
  shapes_.resize(dimensions);
  arguments_.resize(arguments);
  tensors_.resize(program.buffers.size());
  int64_t* shape = shapes_.data();
  for (size_t i = 0; i < program.buffers.size(); ++i) {
    const PlanBuffer& buffer = program.buffers[i];
    tensors_[i] = make_tensor(locate(buffer, memory), to_dl_dtype(buffer.dtype),
                              static_cast<int32_t>(buffer.shape.size()), shape);
    for (const Expression& dimension : buffer.shape) bind(dimension, shape++);
  }
  const auto tensor = [this](int32_t index) { return index < 0 ? nullptr : &tensors_[index]; };
  TVMFFIAny* argument = arguments_.data();
  for (const PlanStep& plan : program.steps) {
    Step& step = steps_.emplace_back();
    step.op = plan.op;
    step.layer = plan.layer;
    step.ids = tensor(plan.ids);
    step.logits = tensor(plan.logits);
    step.weights = tensor(plan.weights);
    step.activation = tensor(plan.activation);
    step.rows = tensor(plan.rows);
    step.scratch = tensor(plan.scratch);
    step.groups = plan.groups;
    if (plan.op != StepOp::kCall) continue;
    step.kernel = services_.kernels->get(plan.kernel);
    step.arguments = argument;
    step.argument_count = static_cast<int32_t>(plan.arguments.size());
    for (const PlanArgument& in : plan.arguments) {
      *argument = in.buffer >= 0 ? tensor_argument(&tensors_[in.buffer]) : integer_argument(0);
      if (in.buffer < 0) bind(in.scalar, &argument->v_int64);
      ++argument;
    }
  }
  output_ = &tensors_[program.output];
}

void* BoundProgram::locate(const PlanBuffer& buffer, const ProgramMemory& memory) const {
  switch (buffer.kind) {
    case BufferKind::kInput: return memory.input;
    case BufferKind::kWeight: return memory.model->weights[buffer.weight].host;
    case BufferKind::kWorkspace: return memory.workspace + buffer.offset;
    case BufferKind::kKCache:
    case BufferKind::kVCache: break;
  }
  const bool k = buffer.kind == BufferKind::kKCache;
  memory.model->check_kv(buffer, values_);
  return (k ? memory.model->k : memory.model->v)[buffer.layer].host;
}

void BoundProgram::bind(const Expression& expression, int64_t* target) {
  *target = expression.evaluate(values_);
  if (expression.fixed()) return;
  (expression.uses(Expression::Op::kPosition) ? by_position_ : by_n_).emplace_back(target, expression);
}

void* BoundProgram::output() {
  const int64_t first = rows_ == OutputRows::kLast ? values_.n - 1 : 0;
  return static_cast<float*>(output_->data) + first * output_->shape[1];
}

void BoundProgram::run(int64_t n, int64_t position, OutputRows rows) {
  rows_ = rows;
  const bool n_changed = values_.n != n;
  values_.n = n;
  values_.position = position;
  if (n_changed) {
    for (const auto& [target, expression] : by_n_) *target = expression.evaluate(values_);
  }
  for (const auto& [target, expression] : by_position_) *target = expression.evaluate(values_);
  for (const Step& step : steps_) {
    if (step.op == StepOp::kCall) {
      step.kernel(step.arguments, step.argument_count);
    } else if (step.op == StepOp::kRoute) {
      services_.router->route(static_cast<const float*>(step.logits->data), n, step.logits->shape[1],
                              static_cast<int32_t*>(step.ids->data), static_cast<float*>(step.weights->data),
                              step.groups);
    } else {
      (*services_.between_layers)();
      services_.compute->bind(step.activation, step.rows, step.scratch);
      const ExpertsCall call{static_cast<const int32_t*>(step.ids->data), services_.router->kept_scores(),
                             step.scratch->shape[0], services_.compute};
      if (phase_ == Phase::kPrefill) {
        services_.experts->prefill(step.layer, call, n, static_cast<uint64_t>(position), *services_.cancelled);
      } else {
        services_.experts->decode(step.layer, call, static_cast<uint64_t>(position));
      }
    }
  }
}

}  // namespace cfmoe
