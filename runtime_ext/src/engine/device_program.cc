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
  for (const PlanBuffer& buffer : program.buffers) buffers_.push_back(place(buffer));
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

device::View DeviceProgram::place(const PlanBuffer& buffer) const {
  const uint64_t bytes = whole(largest_bytes(buffer));
  const auto widened = [](device::View view) {
    view.size = whole(view.size);
    return view;
  };
  switch (buffer.kind) {
    case BufferKind::kInput: return {input_.buffer, input_.offset, bytes};
    case BufferKind::kWeight: return widened(services_.model->weights[buffer.weight].view);
    case BufferKind::kWorkspace: {
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
  workspace.pull(*services_.recorder, logits);
  services_.recorder->finish();
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

void DeviceProgram::run(int64_t n, int64_t position) {
  if (profile_) profile_->start();
  const device::Profile::Scope scope(profile_.get(), device::HostPart::kOther);
  services_.recorder->profile(profile_.get());
  // Where a run before this one failed, its commands may still be at work.
  services_.recorder->finish();
  values_.n = n;
  values_.position = position;
  device::View input = input_;
  for (size_t i = 0; i < program_.buffers.size(); ++i) {
    if (program_.buffers[i].kind == BufferKind::kInput) input.size = now(static_cast<int32_t>(i)).size;
  }
  services_.workspace->push(*services_.recorder, input);
  for (size_t i = 0; i < program_.steps.size(); ++i) {
    const PlanStep& plan = program_.steps[i];
    switch (plan.op) {
      case StepOp::kCall: call(plan, steps_[i]); break;
      case StepOp::kRoute: route(plan, steps_[i]); break;
      case StepOp::kExperts: run_experts(plan); break;
    }
  }
  services_.workspace->pull(*services_.recorder, now(program_.output));
  services_.recorder->finish();
}

}  // namespace cfmoe
