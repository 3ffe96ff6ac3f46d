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

// Places of everything in the workspace block; computed before the block exists, because the budget needs its size.
struct WorkspaceLayout {
  uint64_t tokens = 0, hidden = 0, head_input = 0, lists = 0, candidates = 0, seen = 0, scores = 0, total = 0;
  uint64_t scores_bytes = 0;
  uint64_t lists_bytes = 0;

  WorkspaceLayout(const Plan& plan, const ModelFacts& model, int32_t chunk) {
    const auto hidden_size = static_cast<uint64_t>(model.hidden_size),
               vocabulary = static_cast<uint64_t>(model.vocab_size);
    uint64_t end = std::max({plan.prefill.workspace_bytes, plan.decode.workspace_bytes, plan.head.workspace_bytes});
    const auto take = [&end](uint64_t bytes) {
      const uint64_t place = round_up(end, 64);
      end = place + bytes;
      return place;
    };
    lists_bytes = ExpertsStep::list_bytes(model.num_experts, model.top_k, chunk);
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

Engine::Engine(const std::string& artifact, const EngineOptions& options) : policy_(options.policy) {
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw Error("--threads " + std::to_string(options.threads) + " is outside 0 (one per physical core) to " +
                std::to_string(kMaxThreads));
  }
  parse_io_mode(options.io);
  artifact_ = open_artifact(artifact);
  const std::string& plan = artifact_.target.plan;
  plan_ = parse_plan(read_verified(artifact_.directory, artifact_.manifest, plan), artifact_.path_of(plan),
                     artifact_.manifest, artifact_.index);
  plan_memory(options);
  load(options);
#if defined(__GLIBC__)
  // Reading JSON takes far more memory than what is kept of it.
  malloc_trim(0);
#endif
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
  if (kv_rows_ > plan_.bounds.context.high || kv_rows_ < plan_.bounds.context.low ||
      int64_t{context_size_} - 1 > plan_.bounds.position.high) {
    throw Error(artifact_.path_of(artifact_.target.plan) + ": is not made for a context of " +
                std::to_string(context_size_) + " tokens: use at most " + std::to_string(plan_.bounds.context.high) +
                " or compile the artifact again");
  }
  const uint64_t weights_bytes = check_file_size(artifact_.directory, artifact_.manifest, "weights.bin");
  fixed_ = {round_up(weights_bytes, kBufferAlignment), round_up(KvCache::bytes(plan_.kv, kv_rows_), kBufferAlignment),
            WorkspaceLayout(plan_, facts, chunk()).total};
  BudgetRequest request{options.budget_bytes, options.expert_percent, 0};
  if (request.budget_bytes == 0 && request.expert_percent == 0) request.available_bytes = available_memory();
  budget_ = plan(request);
  append_warning(&warning_, budget_.warning);
}

void Engine::load(const EngineOptions& options) {
  const ModelFacts& facts = model();
  const IoMode io = parse_io_mode(options.io);
  if (KernelLibrary::is_static()) {
    kernels_ = KernelLibrary::linked(artifact_.directory, artifact_.manifest.kernel_set, artifact_.target.name);
  } else {
    // The library runs code, so its digest comes first.
    read_verified(artifact_.directory, artifact_.manifest, artifact_.target.library);
    kernels_ = std::make_unique<KernelLibrary>(artifact_.path_of(artifact_.target.library));
  }
  pool_ = std::make_unique<ThreadPool>(options.threads);
  weights_ = load_weights(artifact_.path_of("weights.bin"), artifact_.index.weights, io);
  append_warning(&warning_, weights_.warning);
  kv_.emplace(plan_.kv, kv_rows_);

  const WorkspaceLayout layout(plan_, facts, chunk());
  const auto hidden_size = static_cast<uint64_t>(facts.hidden_size),
             vocabulary = static_cast<uint64_t>(facts.vocab_size);
  const auto chunk_size = static_cast<uint64_t>(chunk());
  workspace_ = AlignedBuffer(layout.total);
  tokens_ = part<int32_t>(workspace_, layout.tokens, chunk_size);
  hidden_ = part<float>(workspace_, layout.hidden, chunk_size * hidden_size);
  head_input_ = part<float>(workspace_, layout.head_input, hidden_size);
  candidates_ = part<Sampler::Candidate>(workspace_, layout.candidates, vocabulary);
  seen_ = part<uint8_t>(workspace_, layout.seen, vocabulary);

  store_ = open_expert_store(artifact_.path_of("experts.bin"), experts(), io);
  append_warning(&warning_, store_->warning());
  ExpertCacheOptions cache_options;
  cache_options.slots = budget_.slots;
  cache_options.policy = policy_;
  cache_options.log_events = options.log_events;
  if (options.record_trace) {
    const bool scores = options.record_scores || make_policy(policy_, PolicyFacts{1, 1, 1, 1})->wants_scores();
    recorder_.emplace(trace_header(), scores);
    cache_options.recorder = &*recorder_;
  }
  cache_ = std::make_unique<ExpertCache>(*store_, facts.top_k, cache_options);
  router_ = std::make_unique<Router>(
      RouterOptions{facts.router_score == "sigmoid", facts.num_experts, facts.top_k, facts.router_renormalise,
                    static_cast<float>(facts.router_scale)},
      part<uint16_t>(workspace_, layout.scores, cache_->wants_scores() ? layout.scores_bytes / sizeof(uint16_t) : 0));
  const PlanExperts& names = plan_.experts;
  ExpertsStepFacts step;
  step.prefill = {kernels_->get(names.gate_up.prefill), kernels_->get(names.down.prefill)};
  step.decode = {kernels_->get(names.gate_up.decode), kernels_->get(names.down.decode)};
  step.gate_up_tiles = names.gate_up.tiles;
  step.down_tiles = names.down.tiles;
  step.record_bytes = artifact_.index.experts.record_bytes;
  step.slab_dtypes = names.slab_dtypes;
  step.experts = facts.num_experts;
  step.top_k = facts.top_k;
  step.chunk = chunk();
  experts_step_ = std::make_unique<ExpertsStep>(
      step, *cache_, *pool_, part<int32_t>(workspace_, layout.lists, layout.lists_bytes / sizeof(int32_t)));

  ProgramMemory memory;
  for (const TensorEntry& tensor : artifact_.index.weights)
    memory.weights.push_back(weights_.block.data() + tensor.offset);
  memory.kv = &*kv_;
  memory.workspace = reinterpret_cast<char*>(workspace_.data());
  memory.input = tokens_.data();
  memory.context = kv_rows_;
  const ProgramServices services{kernels_.get(), router_.get(), experts_step_.get(), &cancelled_, &between_layers_};
  prefill_ = std::make_unique<BoundProgram>(plan_.prefill, Phase::kPrefill, memory, services);
  decode_ = std::make_unique<BoundProgram>(plan_.decode, Phase::kDecode, memory, services);
  memory.input = head_input_.data();
  head_ = std::make_unique<BoundProgram>(plan_.head, Phase::kDecode, memory, services);
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

std::span<const float> Engine::run(BoundProgram& program, int64_t n, int64_t position) {
  program.run(n, position);
  const auto count = static_cast<uint64_t>(n) * static_cast<uint64_t>(model().hidden_size);
  std::copy_n(static_cast<const float*>(program.output().data), count, hidden_.begin());
  return hidden_.first(count);
}

std::span<const float> Engine::prefill(std::span<const int32_t> tokens, int64_t position) {
  std::copy(tokens.begin(), tokens.end(), tokens_.begin());
  return run(*prefill_, static_cast<int64_t>(tokens.size()), position);
}

std::span<const float> Engine::decode(int32_t token, int64_t position) {
  tokens_[0] = token;
  return run(*decode_, 1, position);
}

std::span<float> Engine::head(std::span<const float> hidden) {
  std::copy(hidden.begin(), hidden.end(), head_input_.begin());
  head_->run(1, 0);
  return {static_cast<float*>(head_->output().data), static_cast<size_t>(model().vocab_size)};
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
    if (const uint64_t available = available_memory(); available > 0)
      request.available_bytes = available + fixed_.sum() + cache_->pool_bytes();
  }
  const BudgetPlan plan = this->plan(request);
  resize(plan);
  append_warning(&warning_, plan.warning);
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
}

Engine::Turn::~Turn() {
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

}  // namespace cfmoe
