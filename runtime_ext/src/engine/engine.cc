// Opening an artifact: check it, divide the budget, then load and bind.
#include "engine/engine.h"

#include <algorithm>
#include <utility>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "error.h"

namespace cfmoe {
namespace {

constexpr uint32_t kDefaultContext = 4096;
constexpr int64_t kContextStep = 16;
constexpr int32_t kMaxThreads = 1024;

uint64_t round_up(uint64_t value, uint64_t step) { return (value + step - 1) / step * step; }

// With memory of its own a device is fed through staging: more reads under way hide what each copy takes.
constexpr int32_t kIoThreads = 2, kStagingThreads = 4;
constexpr uint64_t kWorkEntryBytes = 16;

// Places of everything in the host's workspace block; computed before the block exists, because the budget needs its
// size. `programs` is the largest workspace of the programs that run on the CPU; where there are none, their inputs and
// the experts' lists are in the device's workspace.
struct WorkspaceLayout {
  uint64_t tokens = 0, hidden = 0, head_input = 0, lists = 0, candidates = 0, seen = 0, scores = 0, total = 0;
  uint64_t scores_bytes = 0;
  uint64_t lists_bytes = 0;

  WorkspaceLayout(uint64_t programs, bool device, const ModelFacts& model, int32_t chunk) {
    const auto hidden_size = static_cast<uint64_t>(model.hidden_size),
               vocabulary = static_cast<uint64_t>(model.vocab_size);
    uint64_t end = programs;
    const auto take = [&end](uint64_t bytes) {
      const uint64_t place = round_up(end, 64);
      end = place + bytes;
      return place;
    };
    lists_bytes = device ? 0 : ExpertLists::bytes(model.num_experts, model.top_k, chunk);
    tokens = take(sizeof(int32_t) * static_cast<uint64_t>(chunk));
    hidden = take(sizeof(float) * hidden_size * static_cast<uint64_t>(chunk));
    head_input = take(sizeof(float) * hidden_size);
    lists = take(lists_bytes);
    candidates = take(sizeof(Sampler::Candidate) * vocabulary);
    seen = take(vocabulary);
    scores_bytes = sizeof(uint16_t) * static_cast<uint64_t>(chunk) * static_cast<uint64_t>(model.num_experts);
    scores = take(scores_bytes);
    total = round_up(end, kBufferAlignment);
  }
};

template <typename T>
std::span<T> part(const AlignedBuffer& buffer, uint64_t offset, uint64_t count) {
  return {reinterpret_cast<T*>(buffer.data() + offset), count};
}

void append_warning(std::string* all, const std::string& warning) {
  if (warning.empty() || all->find(warning) != std::string::npos) return;
  *all += (all->empty() ? "" : "; ") + warning;
}

}  // namespace

void Engine::add_warning(const std::string& warning) { append_warning(&warning_, warning); }

Engine::Engine(const std::string& artifact, const EngineOptions& options)
    : policy_(options.policy), profile_(options.profile) {
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw Error("--threads " + std::to_string(options.threads) + " is outside 0 (one per physical core) to " +
                std::to_string(kMaxThreads));
  }
  parse_io_mode(options.io);
  artifact_ = open_artifact(artifact);
  placement_ = place(options.placement, artifact_);
  read_plans();
  plan_memory(options);
  load(options);
#if defined(__GLIBC__)
  // Reading JSON takes far more memory than what is kept of it.
  malloc_trim(0);
#endif
}

void Engine::read_plans() {
  const auto read = [this](const TargetEntry& target, bool gpu) {
    return parse_plan(read_verified(artifact_.directory, artifact_.manifest, target.plan),
                      artifact_.path_of(target.plan), artifact_.manifest, artifact_.index, gpu);
  };
  if (placement_.cpu) cpu_plan_ = read(*placement_.cpu, false);
  if (placement_.gpu) gpu_plan_ = read(*placement_.gpu, true);
}

// Bytes of workspace for what of the plan runs there: prefill, decode or both.
uint64_t Engine::programs_bytes(const std::optional<Plan>& plan, bool cpu) const {
  uint64_t bytes = 0;
  if (plan && on_cpu(Phase::kPrefill) == cpu) bytes = plan->prefill.workspace_bytes;
  if (plan && on_cpu(Phase::kDecode) == cpu)
    bytes = std::max({bytes, plan->decode.workspace_bytes, plan->head.workspace_bytes});
  return bytes;
}

DeviceWorkspaceSizes Engine::device_workspace_sizes() const {
  const ModelFacts& facts = model();
  DeviceWorkspaceSizes sizes = meeting_sizes(*gpu_plan_);
  sizes.programs = programs_bytes(gpu_plan_, false);
  sizes.tokens = sizeof(int32_t) * static_cast<uint64_t>(chunk());
  sizes.hidden = sizeof(float) * static_cast<uint64_t>(facts.hidden_size);
  sizes.lists = ExpertLists::bytes(facts.num_experts, facts.top_k, chunk());
  sizes.work = kWorkEntryBytes * static_cast<uint64_t>(facts.num_experts);
  return sizes;
}

int32_t Engine::io_threads() const {
  return placement_.device && !placement_.device->facts().unified ? kStagingThreads : kIoThreads;
}

uint64_t Engine::available() const {
  if (!placement_.device) return available_memory();
  const uint64_t device = placement_.device->available_memory();
  return placement_.device->facts().unified ? std::min(available_memory(), device) : device;
}

void Engine::plan_memory(const EngineOptions& options) {
  const ModelFacts& facts = model();
  const auto largest = static_cast<uint32_t>(facts.context_size);
  context_size_ = options.context_size == 0 ? std::min(largest, kDefaultContext) : options.context_size;
  if (context_size_ > largest) {
    throw Error("--context-size " + std::to_string(context_size_) + " is more than the model's " +
                std::to_string(largest) + " tokens: use at most " + std::to_string(largest));
  }
  kv_rows_ = static_cast<int64_t>(round_up(context_size_, kContextStep));
  for (const auto& [plan, target] : {std::pair{&cpu_plan_, &placement_.cpu}, std::pair{&gpu_plan_, &placement_.gpu}}) {
    if (!*plan) continue;
    const SymbolBounds& bounds = (*plan)->bounds;
    if (kv_rows_ <= bounds.context.high && kv_rows_ >= bounds.context.low &&
        int64_t{context_size_} - 1 <= bounds.position.high) {
      continue;
    }
    throw Error(artifact_.path_of((*target)->plan) + ": is not made for a context of " + std::to_string(context_size_) +
                " tokens: use at most " + std::to_string(bounds.context.high) + " or compile the artifact again");
  }
  const uint64_t weights_bytes = check_file_size(artifact_.directory, artifact_.manifest, "weights.bin");
  const PlanKv& kv = plan_for(Phase::kPrefill).kv;
  const KvSizes sizes = kv_sizes(kv, kv_rows_), others = kv_sizes(plan_for(Phase::kDecode).kv, kv_rows_);
  if (sizes.k != others.k || sizes.v != others.v)
    throw Error(artifact_.directory + ": its targets disagree about the KV cache; compile the artifact again");
  const WorkspaceLayout layout(programs_bytes(cpu_plan_, true), placement_.device != nullptr, facts, chunk());
  if (placement_.device) {
    const device::Facts& device = placement_.device->facts();
    fixed_ = {ModelMemory::device_weights(device, artifact_.index).total(),
              ModelMemory::device_kv(device, kv, kv_rows_).total(),
              layout.total + DeviceWorkspace::bytes(device, device_workspace_sizes()) +
                  DeviceSlabs::staging_bytes(device, experts().record_stride, io_threads())};
  } else {
    fixed_ = {ModelMemory::host_weights_bytes(weights_bytes), ModelMemory::host_kv_bytes(kv, kv_rows_), layout.total};
  }
  BudgetRequest request{options.budget_bytes, options.expert_percent, 0};
  if (request.budget_bytes == 0 && request.expert_percent == 0) request.available_bytes = available();
  budget_ = plan(request);
  append_warning(&warning_, budget_.warning);
}

void Engine::load(const EngineOptions& options) {
  const ModelFacts& facts = model();
  const IoMode io = parse_io_mode(options.io);
  load_kernels();
  pool_ = std::make_unique<ThreadPool>(options.threads);
  const std::string weights = artifact_.path_of("weights.bin");
  const PlanKv& kv = plan_for(Phase::kPrefill).kv;
  if (placement_.device) {
    memory_ = ModelMemory::on_device(*placement_.device, weights, artifact_.index, kv, kv_rows_, io);
    load_device();
  } else {
    memory_ = ModelMemory::on_host(weights, artifact_.index, kv, kv_rows_, io);
  }
  append_warning(&warning_, memory_->warning);

  const WorkspaceLayout layout(programs_bytes(cpu_plan_, true), placement_.device != nullptr, facts, chunk());
  const auto hidden_size = static_cast<uint64_t>(facts.hidden_size),
             vocabulary = static_cast<uint64_t>(facts.vocab_size);
  workspace_ = AlignedBuffer(layout.total);
  hidden_ = part<float>(workspace_, layout.hidden, static_cast<uint64_t>(chunk()) * hidden_size);
  candidates_ = part<Sampler::Candidate>(workspace_, layout.candidates, vocabulary);
  seen_ = part<uint8_t>(workspace_, layout.seen, vocabulary);
  lists_ =
      ExpertLists(device_workspace_ ? device_workspace_->list_memory
                                    : part<int32_t>(workspace_, layout.lists, layout.lists_bytes / sizeof(int32_t)));
  open_cache(options);
  router_ = std::make_unique<Router>(
      RouterOptions{facts.router_score == "sigmoid", facts.num_experts, facts.top_k, facts.router_renormalise,
                    static_cast<float>(facts.router_scale)},
      part<uint16_t>(workspace_, layout.scores, cache_->wants_scores() ? layout.scores_bytes / sizeof(uint16_t) : 0),
      &*pool_);
  experts_step_ =
      std::make_unique<ExpertsStep>(ExpertsStepFacts{facts.num_experts, facts.top_k, chunk()}, *cache_, lists_);
  if (cpu_plan_) {
    make_cpu_programs(reinterpret_cast<int32_t*>(workspace_.data() + layout.tokens),
                      reinterpret_cast<float*>(workspace_.data() + layout.head_input));
  }
  if (gpu_plan_) make_device_programs();
}

void Engine::load_kernels() {
  if (gpu_plan_) {
    // The library runs code, so its digest comes first.
    device_kernels_.emplace(*placement_.device, *gpu_plan_,
                            read_verified(artifact_.directory, artifact_.manifest, placement_.gpu->library));
  }
  if (!cpu_plan_) return;
  if (KernelLibrary::is_static()) {
    kernels_ = KernelLibrary::linked(artifact_.directory, placement_.cpu->kernel_set, placement_.cpu->name);
    return;
  }
  read_verified(artifact_.directory, artifact_.manifest, placement_.cpu->library);
  kernels_ = std::make_unique<KernelLibrary>(artifact_.path_of(placement_.cpu->library));
}

void Engine::load_device() {
  device::Device& device = *placement_.device;
  stream_ = device.make_stream();
  device_recorder_.emplace(*stream_);
  device_workspace_.emplace(device, device_workspace_sizes());
  device_slabs_ = std::make_unique<DeviceSlabs>(device, *device_recorder_, experts().record_stride, io_threads());
}

void Engine::open_cache(const EngineOptions& options) {
  store_ = open_expert_store(artifact_.path_of("experts.bin"), experts(), parse_io_mode(options.io));
  append_warning(&warning_, store_->warning());
  ExpertCacheOptions cache_options;
  cache_options.slots = budget_.slots;
  cache_options.policy = policy_;
  cache_options.io_threads = io_threads();
  cache_options.log_events = options.log_events;
  cache_options.slabs = device_slabs_.get();
  if (options.record_trace) {
    const bool scores = options.record_scores || make_policy(policy_, PolicyFacts{1, 1, 1, 1})->wants_scores();
    recorder_.emplace(trace_header(), scores);
    cache_options.recorder = &*recorder_;
  }
  cache_ = std::make_unique<ExpertCache>(*store_, model().top_k, cache_options);
}

void Engine::make_cpu_programs(int32_t* tokens, float* head_input) {
  const PlanExperts& names = cpu_plan_->experts;
  const CpuExpertsFacts facts{names.gate_up.tiles, names.down.tiles, experts().record_bytes, names.slab_dtypes,
                              model().num_experts};
  ProgramMemory memory{&*memory_, reinterpret_cast<char*>(workspace_.data()), tokens, kv_rows_};
  const auto services = [&](Phase phase, const std::string& gate_up, const std::string& down) {
    std::unique_ptr<CpuExperts>& compute = cpu_experts_[static_cast<size_t>(phase)];
    compute = std::make_unique<CpuExperts>(facts, ExpertKernelSet{kernels_->get(gate_up), kernels_->get(down)}, *pool_,
                                           lists_);
    return ProgramServices{kernels_.get(), router_.get(), experts_step_.get(),
                           compute.get(),  &cancelled_,   &between_layers_};
  };
  if (on_cpu(Phase::kPrefill)) {
    prefill_ = std::make_unique<BoundProgram>(cpu_plan_->prefill, Phase::kPrefill, memory,
                                              services(Phase::kPrefill, names.gate_up.prefill, names.down.prefill));
  }
  if (on_cpu(Phase::kDecode)) {
    const ProgramServices decode = services(Phase::kDecode, names.gate_up.decode, names.down.decode);
    decode_ = std::make_unique<BoundProgram>(cpu_plan_->decode, Phase::kDecode, memory, decode);
    memory.input = head_input;
    head_ = std::make_unique<BoundProgram>(cpu_plan_->head, Phase::kDecode, memory, decode);
  }
}

void Engine::make_device_programs() {
  const PlanExperts& names = gpu_plan_->experts;
  device::Device& device = *placement_.device;
  const auto services = [&](Phase phase, const std::string& gate_up, const std::string& down) {
    std::unique_ptr<DeviceExperts>& compute = device_experts_[static_cast<size_t>(phase)];
    compute = std::make_unique<DeviceExperts>(phase, device, *device_recorder_, *device_workspace_,
                                              device_kernels_->get(gate_up), device_kernels_->get(down));
    return DeviceServices{&device,       &*device_recorder_,  &*device_kernels_, &*memory_,   &*device_workspace_,
                          router_.get(), experts_step_.get(), compute.get(),     &cancelled_, &between_layers_,
                          profile_};
  };
  const device::View &tokens = device_workspace_->tokens, &hidden = device_workspace_->hidden;
  if (!on_cpu(Phase::kPrefill)) {
    prefill_ = std::make_unique<DeviceProgram>(gpu_plan_->prefill, Phase::kPrefill, *gpu_plan_, tokens, kv_rows_,
                                               services(Phase::kPrefill, names.gate_up.prefill, names.down.prefill));
  }
  if (!on_cpu(Phase::kDecode)) {
    const DeviceServices decode = services(Phase::kDecode, names.gate_up.decode, names.down.decode);
    decode_ = std::make_unique<DeviceProgram>(gpu_plan_->decode, Phase::kDecode, *gpu_plan_, tokens, kv_rows_, decode);
    head_ = std::make_unique<DeviceProgram>(gpu_plan_->head, Phase::kDecode, *gpu_plan_, hidden, kv_rows_, decode);
  }
}

std::vector<std::pair<std::string, DeviceProgram*>> Engine::device_programs() const {
  std::vector<std::pair<std::string, DeviceProgram*>> out;
  if (!on_cpu(Phase::kPrefill)) out.emplace_back("prefill", static_cast<DeviceProgram*>(prefill_.get()));
  if (!on_cpu(Phase::kDecode)) {
    out.emplace_back("decode", static_cast<DeviceProgram*>(decode_.get()));
    out.emplace_back("head", static_cast<DeviceProgram*>(head_.get()));
  }
  return out;
}

std::vector<std::pair<std::string, const device::Profile*>> Engine::profiles() const {
  std::vector<std::pair<std::string, const device::Profile*>> out;
  for (const auto& [name, program] : device_programs()) {
    if (program->profile() != nullptr) out.emplace_back(name, program->profile());
  }
  return out;
}

void Engine::reset_profiles() {
  for (const auto& [name, program] : device_programs()) {
    if (program->profile() != nullptr) program->profile()->reset();
  }
  if (device_recorder_) device_recorder_->forget_time();
}

Trace Engine::trace_header() const {
  Trace header;
  header.layers = experts().layers;
  header.experts = experts().experts;
  header.top_k = model().top_k;
  header.chunk_size = static_cast<uint32_t>(chunk());
  header.slots = static_cast<uint32_t>(budget_.slots);
  header.expert_bytes = experts().record_bytes;
  header.policy = policy_;
  return header;
}

std::span<const float> Engine::run(Program& program, int64_t n, int64_t position, OutputRows rows) {
  program.run(n, position, rows);
  if (rows == OutputRows::kNone) return {};
  const auto count =
      static_cast<uint64_t>(rows == OutputRows::kAll ? n : 1) * static_cast<uint64_t>(model().hidden_size);
  std::copy_n(static_cast<const float*>(program.output()), count, hidden_.begin());
  return hidden_.first(count);
}

std::span<const float> Engine::prefill(std::span<const int32_t> tokens, int64_t position, OutputRows rows) {
  std::copy(tokens.begin(), tokens.end(), static_cast<int32_t*>(prefill_->input()));
  return run(*prefill_, static_cast<int64_t>(tokens.size()), position, rows);
}

std::span<float> Engine::decode(int32_t token, int64_t position, bool logits) {
  *static_cast<int32_t*>(decode_->input()) = token;
  if (!on_cpu(Phase::kDecode) && logits) {
    static_cast<DeviceProgram&>(*decode_).run(1, position, OutputRows::kLast, static_cast<DeviceProgram*>(head_.get()));
    return this->logits();
  }
  const std::span<const float> hidden = run(*decode_, 1, position, logits ? OutputRows::kLast : OutputRows::kNone);
  return logits ? head(hidden) : std::span<float>();
}

std::span<float> Engine::head(std::span<const float> hidden) {
  std::copy(hidden.begin(), hidden.end(), static_cast<float*>(head_->input()));
  head_->run(1, 0, OutputRows::kAll);
  return logits();
}

std::span<float> Engine::logits() {
  return {static_cast<float*>(head_->output()), static_cast<size_t>(model().vocab_size)};
}

PhaseMetrics Engine::cache_metrics(Phase phase) const {
  const std::lock_guard lock(budget_mutex_);
  return cache_->metrics(phase);
}

void Engine::residents(std::span<uint8_t> out) const {
  const std::lock_guard lock(budget_mutex_);
  cache_->residents(out);
}

uint64_t Engine::budget_of(int32_t slots) const {
  return fixed_.sum() + static_cast<uint64_t>(slots) * experts().record_stride;
}

BudgetPlan Engine::plan(BudgetRequest request) const {
  const ExpertIndex& index = experts();
  return plan_budget(fixed_, index.record_stride, index.layers * index.experts, model().top_k, request);
}

void Engine::resize(const BudgetPlan& plan) {
  const std::lock_guard lock(budget_mutex_);
  cache_->resize(plan.slots);
  if (recorder_ && plan.slots != budget_.slots) recorder_->forget_slots();
  budget_ = plan;
}

void Engine::set_budget(uint64_t budget_bytes, double expert_percent) {
  std::optional<Turn> turn;
  if (!gate_.paused_here()) turn.emplace(*this);
  BudgetRequest request{budget_bytes, expert_percent, 0};
  if (budget_bytes == 0 && expert_percent == 0) {
    // What this engine holds already it need not get again.
    if (const uint64_t left = available(); left > 0)
      request.available_bytes = left + fixed_.sum() + cache_->pool_bytes();
  }
  const BudgetPlan plan = this->plan(request);
  resize(plan);
  append_warning(&warning_, plan.warning);
}

void Engine::keep_warm(std::span<const uint32_t> ids) {
  const Turn turn(*this);
  const auto width = static_cast<uint32_t>(experts().experts), total = width * static_cast<uint32_t>(experts().layers);
  std::vector<ExpertKey> keys;
  for (const uint32_t id : ids) {
    if (id >= total) {
      throw Error("expert " + std::to_string(id) + " to keep warm is outside 0 to " + std::to_string(total - 1) +
                  ", layer by layer: name experts of this model");
    }
    keys.push_back({static_cast<int32_t>(id / width), static_cast<int32_t>(id % width)});
  }
  const std::lock_guard lock(budget_mutex_);
  cache_->keep_warm(std::move(keys));
}

void Engine::trim(uint64_t budget_bytes) {
  trim_request_ = std::max(budget_bytes, uint64_t{1});
  if (gate_.paused_here()) {
    apply_trim();
    return;
  }
  // A call that ends meanwhile sees the request, or leaves the gate open for this.
  while (trim_request_ != 0 && gate_.try_enter_trim()) {
    try {
      apply_trim();
    } catch (...) {
      gate_.leave();
      throw;
    }
    gate_.leave();
  }
}

void Engine::apply_trim() {
  if (trim_request_.load(std::memory_order_relaxed) == 0) return;
  const uint64_t wanted = std::max(trim_request_.exchange(0), budget_of(model().top_k));
  if (wanted < budget_.budget_bytes) resize(plan({wanted, 0, 0}));
}

Engine::Turn::Turn(Engine& engine) : engine_(engine) {
  engine_.gate_.enter();
  if (engine_.trim_error_) {
    const std::exception_ptr error = std::exchange(engine_.trim_error_, nullptr);
    engine_.gate_.leave();
    std::rethrow_exception(error);
  }
  engine_.cache_->hold_ahead(true);
}

Engine::Turn::~Turn() {
  engine_.cache_->hold_ahead(false);
  bool entered = true;
  while (entered) {
    try {
      engine_.apply_trim();
    } catch (...) {
      engine_.trim_error_ = std::current_exception();
    }
    engine_.gate_.leave();
    // One that was asked for before the gate opened was left to this call.
    entered = engine_.trim_request_ != 0 && engine_.gate_.try_enter_trim();
  }
}

EngineMemory Engine::memory() const {
  const std::lock_guard lock(budget_mutex_);
  const ExpertIndex& index = experts();
  EngineMemory memory{
      budget_, fixed_, budget_of(model().top_k), budget_of(index.layers * index.experts), cache_->pool_bytes(), 0};
  if (store_->mode() == IoMode::kMmap) {
    memory.mapped_bytes =
        static_cast<uint64_t>(index.layers) * static_cast<uint64_t>(index.experts) * index.record_stride;
  }
  return memory;
}

std::unique_ptr<Engine> open_engine(const std::string& artifact, EngineOptions options) {
  if (options.placement.device != "auto") return std::make_unique<Engine>(artifact, options);
  const Manifest manifest = read_manifest(artifact);
  std::string reasons;
  for (const device::Kind kind : {device::Kind::kMetal, device::Kind::kVulkan, device::Kind::kOpenCl}) {
    options.placement.device = device::kind_name(kind);
    const auto has = [&](const TargetEntry& target) { return target.device == options.placement.device; };
    if (std::none_of(manifest.targets.begin(), manifest.targets.end(), has)) continue;
    try {
      const std::vector<device::Facts> devices = device::list_devices(kind);
      const size_t chosen = device::choose_device(kind, devices, device::options_from_environment(kind).device);
      // A device that is software is this CPU, by a detour.
      if (devices[chosen].type == device::Type::kCpu) throw Error(devices[chosen].name + " is no GPU");
      return std::make_unique<Engine>(artifact, options);
    } catch (const Error& error) {
      reasons += (reasons.empty() ? "" : "; ") + std::string(error.what());
    }
  }
  options.placement.device = "cpu";
  auto engine = std::make_unique<Engine>(artifact, options);
  engine->add_warning("--device auto: running on the CPU: " +
                      (reasons.empty() ? "the artifact has no target for a GPU" : reasons));
  return engine;
}

}  // namespace cfmoe
