// Runs the steps of a plan on a device, with the host's steps between submissions.
#include "engine/device_program.h"

#include <algorithm>

#include "artifact/checksum.h"
#include "error.h"

namespace cfmoe {
namespace {

uint64_t largest_bytes(const PlanBuffer& buffer) {
  auto bytes = static_cast<uint64_t>(dtype_bytes(buffer.dtype));
  for (const Expression& dimension : buffer.shape) bytes *= static_cast<uint64_t>(dimension.range().high);
  return bytes;
}

bool reads(const PlanProgram& program, int32_t buffer) {
  return std::any_of(program.steps.begin(), program.steps.end(), [buffer](const PlanStep& step) {
    return std::any_of(step.arguments.begin(), step.arguments.end(),
                       [buffer](const PlanArgument& argument) { return argument.buffer == buffer; });
  });
}

// Kernels read whole vectors of 16 bytes; buffers are padded for that.
uint64_t whole(uint64_t bytes) { return (bytes + 15) / 16 * 16; }

}  // namespace

DeviceWorkspaceSizes meeting_sizes(const Plan& plan) {
  DeviceWorkspaceSizes sizes;
  for (const PlanProgram* program : {&plan.prefill, &plan.decode, &plan.head}) {
    const auto grow = [program](uint64_t* size, int32_t buffer) {
      *size = std::max(*size, whole(largest_bytes(program->buffers[buffer])));
    };
    grow(&sizes.results, program->output);
    for (const PlanStep& step : program->steps) {
      if (step.op != StepOp::kRoute) continue;
      grow(&sizes.results, step.logits);
      grow(&sizes.ids, step.ids);
      grow(&sizes.weights, step.weights);
    }
  }
  return sizes;
}

DeviceKernels::DeviceKernels(device::Device& device, const Plan& plan, std::string_view library) {
  std::vector<device::KernelCode> codes;
  for (const auto& [name, kernel] : plan.kernels) codes.push_back(kernel.code);
  loaded_ = device.load(library, codes, xxh3_64(library));
  size_t i = 0;
  for (const auto& [name, kernel] : plan.kernels) kernels_[name] = {loaded_[i++].get(), &kernel};
}

DeviceKernel DeviceKernels::get(const std::string& name) const {
  const auto found = kernels_.find(name);
  if (found == kernels_.end()) throw Error("plan.json: no kernel " + name + "; compile the artifact again");
  return found->second;
}

DeviceProgram::DeviceProgram(const PlanProgram& program, Phase phase, const Plan& plan, const device::View& input,
                             int64_t context, const DeviceServices& services)
    : program_(program),
      phase_(phase),
      input_(input),
      services_(services),
      bounds_(plan.bounds),
      values_{1, 0, context} {
  if (services.profile != ProfileMode::kOff)
    profile_ = std::make_unique<device::Profile>(services.profile == ProfileMode::kKernels);
  meeting_places_ = meeting_places();
  for (size_t i = 0; i < program.buffers.size(); ++i) buffers_.push_back(place(static_cast<int32_t>(i)));
  for (const PlanStep& in : program.steps) {
    Step& step = steps_.emplace_back();
    if (in.op == StepOp::kRoute) step.ids_used = reads(program, in.ids);
    if (in.op != StepOp::kCall) continue;
    step.kernel = services_.kernels->get(in.kernel);
    std::vector<device::View> views;
    for (const PlanArgument& argument : in.arguments) {
      if (argument.buffer >= 0) views.push_back(buffers_[argument.buffer]);
    }
    step.bindings = services_.device->bind(*step.kernel.kernel, views);
    step.scalars.resize(in.arguments.size() - views.size());
  }
}

// One place serves all layers: what lies there is used up before the next layer's is written.
std::map<int32_t, device::View> DeviceProgram::meeting_places() const {
  std::map<int32_t, device::View> places;
  const DeviceWorkspace& workspace = *services_.workspace;
  if (workspace.results.buffer == nullptr) return places;
  bool routes = false;
  for (const PlanStep& step : program_.steps) {
    if (step.op != StepOp::kRoute) continue;
    routes = true;
    places[step.logits] = workspace.results;
    places[step.ids] = workspace.ids;
    places[step.weights] = workspace.weights;
  }
  // Logits are read by the host alone; hidden states by the next program.
  if (!routes) places[program_.output] = workspace.results;
  return places;
}

device::View DeviceProgram::place(int32_t index) const {
  const PlanBuffer& buffer = program_.buffers[index];
  const uint64_t bytes = whole(largest_bytes(buffer));
  const auto widened = [](device::View view) {
    view.size = whole(view.size);
    return view;
  };
  switch (buffer.kind) {
    case BufferKind::kInput: return {input_.buffer, input_.offset, bytes};
    case BufferKind::kWeight: return widened(services_.model->weights[buffer.weight].view);
    case BufferKind::kWorkspace: {
      if (const auto found = meeting_places_.find(index); found != meeting_places_.end())
        return {found->second.buffer, found->second.offset, bytes};
      const device::View& all = services_.workspace->programs;
      return {all.buffer, all.offset + buffer.offset, bytes};
    }
    case BufferKind::kKCache:
    case BufferKind::kVCache: break;
  }
  services_.model->check_kv(buffer, values_);
  const bool k = buffer.kind == BufferKind::kKCache;
  return widened((k ? services_.model->k : services_.model->v)[buffer.layer].view);
}

device::View DeviceProgram::now(int32_t buffer) const {
  const PlanBuffer& plan = program_.buffers[buffer];
  device::View view = buffers_[buffer];
  view.size = tensor_bytes(plan.dtype, plan.shape, values_);
  return view;
}

void DeviceProgram::call(const PlanStep& plan, Step& step) {
  size_t i = 0;
  for (const PlanArgument& argument : plan.arguments) {
    if (argument.buffer < 0) step.scalars[i++] = static_cast<int32_t>(argument.scalar.evaluate(values_));
  }
  std::array<uint32_t, 3> groups;
  if (grid_of(*step.kernel.plan, step.scalars, &groups))
    services_.recorder->dispatch(*step.bindings, step.scalars, groups);
}

void DeviceProgram::route(const PlanStep& plan, const Step& step) {
  DeviceWorkspace& workspace = *services_.workspace;
  const device::View logits = now(plan.logits), ids = now(plan.ids), weights = now(plan.weights);
  const int64_t stride = program_.buffers[plan.logits].shape[1].evaluate(values_);
  {
    const device::Profile::Scope scope(profile_.get(), device::HostPart::kRoute);
    services_.router->route(reinterpret_cast<const float*>(workspace.host(logits)), values_.n, stride,
                            reinterpret_cast<int32_t*>(workspace.host(ids)),
                            reinterpret_cast<float*>(workspace.host(weights)), plan.groups);
  }
  if (step.ids_used) workspace.push(*services_.recorder, ids);
  workspace.push(*services_.recorder, weights);
}

void DeviceProgram::run_experts(const PlanStep& plan) {
  const device::Profile::Scope scope(profile_.get(), device::HostPart::kExperts);
  (*services_.between_layers)();
  services_.compute->bind(buffers_[plan.activation], buffers_[plan.rows], buffers_[plan.scratch]);
  const ExpertsCall call{reinterpret_cast<const int32_t*>(services_.workspace->host(buffers_[plan.ids])),
                         services_.router->kept_scores(), program_.buffers[plan.scratch].shape[0].evaluate(values_),
                         services_.compute};
  const auto position = static_cast<uint64_t>(values_.position);
  if (phase_ == Phase::kPrefill) {
    services_.experts->prefill(plan.layer, call, values_.n, position, *services_.cancelled);
  } else {
    services_.experts->decode(plan.layer, call, position);
  }
}

size_t DeviceProgram::record_calls(size_t step) {
  for (; step < steps_.size() && program_.steps[step].op == StepOp::kCall; ++step)
    call(program_.steps[step], steps_[step]);
  return step;
}

size_t DeviceProgram::record_segment(size_t step) {
  step = record_calls(step);
  if (step == steps_.size()) {
    record_end();
  } else if (program_.steps[step].op == StepOp::kRoute) {
    services_.workspace->pull(*services_.recorder, now(program_.steps[step].logits));
  }
  return step;
}

void DeviceProgram::record_end() {
  DeviceWorkspace& workspace = *services_.workspace;
  device::View rows = now(program_.output);
  if (rows_ == OutputRows::kLast) {
    const uint64_t row = rows.size / static_cast<uint64_t>(values_.n);
    rows = {rows.buffer, rows.offset + rows.size - row, row};
  }
  if (next_ != nullptr) {
    services_.recorder->copy(rows, {next_->input_.buffer, next_->input_.offset, rows.size});
    next_->values_.n = 1;
    next_->rows_ = OutputRows::kAll;
    next_->next_ = nullptr;
    next_->record_segment(0);
    return;
  }
  if (rows_ == OutputRows::kNone) return;
  const device::View& results = workspace.results;
  if (results.buffer != nullptr && rows.buffer != results.buffer) {
    const device::View to{results.buffer, results.offset, rows.size};
    services_.recorder->copy(rows, to);
    rows = to;
  } else {
    workspace.pull(*services_.recorder, rows);
  }
  output_ = workspace.host(rows);
}

void DeviceProgram::run(int64_t n, int64_t position, OutputRows rows, DeviceProgram* next) {
  if (profile_) profile_->start();
  const device::Profile::Scope scope(profile_.get(), device::HostPart::kOther);
  device::Recorder& recorder = *services_.recorder;
  recorder.profile(profile_.get());
  // Where a run before this one failed, its commands may still be at work.
  recorder.drop_deferred();
  recorder.finish();
  values_.n = n;
  values_.position = position;
  rows_ = rows;
  next_ = next;
  device::View input = input_;
  for (size_t i = 0; i < program_.buffers.size(); ++i) {
    if (program_.buffers[i].kind == BufferKind::kInput) input.size = now(static_cast<int32_t>(i)).size;
  }
  services_.workspace->push(recorder, input);
  size_t deferred = 0, deferred_end = 0;  // what follows the experts has been recorded already
  for (size_t i = record_segment(0); i < steps_.size();) {
    const PlanStep& plan = program_.steps[i];
    if (plan.op == StepOp::kRoute) {
      recorder.submit_deferred();
      const size_t experts = experts_after(i);
      if (experts > 0 && recorder.can_defer()) {
        recorder.begin_deferred();
        deferred = experts + 1;
        deferred_end = record_segment(deferred);
        recorder.end_deferred();
      }
      recorder.finish();
      route(plan, steps_[i]);
    } else {
      run_experts(plan);
    }
    ++i;
    i = deferred > 0 && i == deferred ? deferred_end : record_segment(i);
  }
  recorder.submit_deferred();
  recorder.finish();
}

size_t DeviceProgram::experts_after(size_t route) const {
  for (size_t i = route + 1; i < steps_.size() && program_.steps[i].op != StepOp::kRoute; ++i) {
    if (program_.steps[i].op == StepOp::kExperts) return i;
  }
  return 0;
}

}  // namespace cfmoe
