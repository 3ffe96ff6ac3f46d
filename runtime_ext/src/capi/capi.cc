// The C API: checks what callers give, and turns exceptions into a status and a line of text.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>

#include "capi/guard.h"
#include "cfmoe/cfmoe.h"
#include "engine/engine.h"
#include "engine/session.h"
#include "error.h"

struct cfmoe_engine {
  const std::unique_ptr<cfmoe::Engine> owner;
  cfmoe::Engine& engine;
  cfmoe_engine(const std::string& artifact, const cfmoe::EngineOptions& options)
      : owner(cfmoe::open_engine(artifact, options)), engine(*owner) {}
};

struct cfmoe_session {
  cfmoe::Session session;
  explicit cfmoe_session(cfmoe_engine* engine) : session(engine->engine) {}
};

using cfmoe::capi::guarded;
using cfmoe::capi::require;
using cfmoe::capi::require_size;

namespace {

std::span<const int32_t> token_span(const int32_t* tokens, uint32_t count) {
  require(tokens != nullptr || count == 0, "tokens is NULL");
  return {tokens, count};
}

cfmoe_phase_metrics phase_metrics(const cfmoe::PhaseCost& cost, const cfmoe::PhaseMetrics& cache) {
  return {cost.tokens,
          cost.seconds,
          cache.hits,
          cache.misses,
          cache.prefetched,
          cache.bytes_read,
          static_cast<double>(cache.stall_ns) * 1e-6};
}

}  // namespace

uint32_t cfmoe_abi_version(void) { return CFMOE_ABI_VERSION; }
const char* cfmoe_version(void) { return CFMOE_VERSION; }

void cfmoe_engine_options_init(cfmoe_engine_options* options) {
  if (options == nullptr) return;
  *options = cfmoe_engine_options{};
  options->struct_size = sizeof(cfmoe_engine_options);
}

void cfmoe_sampling_init(cfmoe_sampling* sampling) {
  if (sampling == nullptr) return;
  *sampling = cfmoe_sampling{};
  sampling->struct_size = sizeof(cfmoe_sampling);
  sampling->top_p = 1.0F;
  sampling->repetition_penalty = 1.0F;
}

cfmoe_status cfmoe_engine_open(const char* artifact, const cfmoe_engine_options* options, cfmoe_engine** out,
                               char* error, size_t error_size) {
  if (out != nullptr) *out = nullptr;
  return guarded(error, error_size, [&] {
    require(artifact != nullptr && out != nullptr, "artifact or out is NULL");
    cfmoe::EngineOptions engine;
    if (options != nullptr) {
      require_size(options->struct_size, sizeof(cfmoe_engine_options), "cfmoe_engine_options");
      engine.budget_bytes = options->budget_bytes;
      engine.expert_percent = options->expert_percent;
      engine.context_size = options->context_size;
      engine.threads = options->threads;
      if (options->io != nullptr) engine.io = options->io;
      if (options->policy != nullptr) engine.policy = options->policy;
      engine.log_events = options->log_events != 0;
      engine.record_trace = options->record_trace != 0;
      engine.record_scores = options->record_scores != 0;
      cfmoe::PlacementOptions& placement = engine.placement;
      if (options->device != nullptr) placement.device = options->device;
      if (options->prefill_device != nullptr) placement.prefill_device = options->prefill_device;
      if (options->decode_device != nullptr) placement.decode_device = options->decode_device;
    }
    *out = new cfmoe_engine(artifact, engine);
  });
}

void cfmoe_engine_close(cfmoe_engine* engine) { delete engine; }

void cfmoe_engine_model(const cfmoe_engine* engine, cfmoe_model_info* out) {
  if (engine == nullptr || out == nullptr) return;
  const cfmoe::ModelFacts& model = engine->engine.model();
  *out = {static_cast<uint32_t>(model.vocab_size),       engine->engine.context_size(),
          static_cast<uint32_t>(model.num_layers),       static_cast<uint32_t>(model.moe_layers.size()),
          static_cast<uint32_t>(model.num_experts),      static_cast<uint32_t>(model.top_k),
          static_cast<uint32_t>(engine->engine.chunk()), engine->engine.experts().record_bytes};
}

void cfmoe_engine_memory(const cfmoe_engine* engine, cfmoe_memory* out) {
  if (engine == nullptr || out == nullptr) return;
  const cfmoe::EngineMemory memory = engine->engine.memory();
  const cfmoe::ExpertIndex& experts = engine->engine.experts();
  *out = {memory.budget.budget_bytes,
          memory.smallest_budget,
          memory.largest_budget,
          memory.fixed.weights_bytes,
          memory.fixed.kv_bytes,
          memory.fixed.workspace_bytes,
          memory.pool_bytes,
          0,  // the arena borrows the pool's slots
          memory.mapped_bytes,
          static_cast<uint32_t>(memory.budget.slots),
          static_cast<uint32_t>(experts.layers * experts.experts)};
}

cfmoe_status cfmoe_engine_set_budget(cfmoe_engine* engine, uint64_t budget_bytes, double expert_percent, char* error,
                                     size_t error_size) {
  return guarded(error, error_size, [&] {
    require(engine != nullptr, "engine is NULL");
    engine->engine.set_budget(budget_bytes, expert_percent);
  });
}

cfmoe_status cfmoe_engine_keep_warm(cfmoe_engine* engine, const uint32_t* experts, size_t count, char* error,
                                    size_t error_size) {
  return guarded(error, error_size, [&] {
    require(engine != nullptr, "engine is NULL");
    require(experts != nullptr || count == 0, "experts is NULL");
    engine->engine.keep_warm({experts, count});
  });
}

cfmoe_status cfmoe_engine_trim(cfmoe_engine* engine, uint64_t budget_bytes, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(engine != nullptr, "engine is NULL");
    engine->engine.trim(budget_bytes);
  });
}

size_t cfmoe_engine_residents(const cfmoe_engine* engine, uint8_t* out, size_t capacity) {
  if (engine == nullptr) return 0;
  const cfmoe::ExpertIndex& experts = engine->engine.experts();
  const size_t total = static_cast<size_t>(experts.layers) * static_cast<size_t>(experts.experts);
  if (out != nullptr) engine->engine.residents(std::span(out, std::min(capacity, total)));
  return total;
}

const char* cfmoe_engine_io(const cfmoe_engine* engine) { return engine == nullptr ? "" : engine->engine.io(); }
const char* cfmoe_engine_device(const cfmoe_engine* engine, int decode) {
  if (engine == nullptr) return "";
  return engine->engine.device_of(decode != 0 ? cfmoe::Phase::kDecode : cfmoe::Phase::kPrefill).c_str();
}

const char* cfmoe_engine_device_name(const cfmoe_engine* engine) {
  return engine == nullptr ? "" : engine->engine.device_name();
}

const char* cfmoe_engine_policy(const cfmoe_engine* engine) {
  return engine == nullptr ? "" : engine->engine.policy().c_str();
}
const char* cfmoe_engine_warning(const cfmoe_engine* engine) {
  return engine == nullptr ? "" : engine->engine.warning().c_str();
}

cfmoe_status cfmoe_session_create(cfmoe_engine* engine, cfmoe_session** out, char* error, size_t error_size) {
  if (out != nullptr) *out = nullptr;
  return guarded(error, error_size, [&] {
    require(engine != nullptr && out != nullptr, "engine or out is NULL");
    *out = new cfmoe_session(engine);
  });
}

void cfmoe_session_destroy(cfmoe_session* session) { delete session; }

cfmoe_status cfmoe_session_reset(cfmoe_session* session, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(session != nullptr, "session is NULL");
    session->session.reset();
  });
}

cfmoe_status cfmoe_session_rewind(cfmoe_session* session, uint32_t position, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(session != nullptr, "session is NULL");
    session->session.rewind(position);
  });
}

uint32_t cfmoe_session_position(const cfmoe_session* session) {
  return session == nullptr ? 0 : session->session.position();
}

cfmoe_status cfmoe_session_generate(cfmoe_session* session, const int32_t* tokens, uint32_t token_count,
                                    uint32_t max_new_tokens, const cfmoe_sampling* sampling, const int32_t* stop_tokens,
                                    uint32_t stop_token_count, cfmoe_token_callback callback, void* user,
                                    int32_t* out_tokens, uint32_t* out_count, char* error, size_t error_size) {
  uint32_t count = 0;
  const cfmoe_status status = guarded(error, error_size, [&] {
    require(session != nullptr, "session is NULL");
    cfmoe::SamplingOptions options;
    if (sampling != nullptr) {
      require_size(sampling->struct_size, sizeof(cfmoe_sampling), "cfmoe_sampling");
      options = {sampling->temperature, sampling->top_k, sampling->top_p, sampling->repetition_penalty, sampling->seed};
    }
    std::span<const int32_t> stops = session->session.engine().model().eos_token_ids;
    if (stop_tokens != nullptr) stops = {stop_tokens, stop_token_count};
    session->session.generate(token_span(tokens, token_count), max_new_tokens, options, stops, [&](int32_t token) {
      if (out_tokens != nullptr) out_tokens[count] = token;
      ++count;
      return callback == nullptr || callback(token, user) == 0;
    });
  });
  if (out_count != nullptr) *out_count = count;
  return status;
}

cfmoe_status cfmoe_session_feed(cfmoe_session* session, const int32_t* tokens, uint32_t token_count, int decode,
                                float* logits, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(session != nullptr, "session is NULL");
    session->session.feed(token_span(tokens, token_count), decode != 0, logits);
  });
}

void cfmoe_session_cancel(cfmoe_session* session) {
  if (session != nullptr) session->session.cancel();
}

void cfmoe_session_metrics(const cfmoe_session* session, cfmoe_metrics* out) {
  if (session == nullptr || out == nullptr) return;
  const cfmoe::SessionMetrics& metrics = session->session.metrics();
  const cfmoe::Engine& engine = session->session.engine();
  *out = {phase_metrics(metrics.prefill, engine.cache_metrics(cfmoe::Phase::kPrefill)),
          phase_metrics(metrics.decode, engine.cache_metrics(cfmoe::Phase::kDecode)), metrics.first_32_hits,
          metrics.first_32_accesses};
}

cfmoe_status cfmoe_session_write_trace(const cfmoe_session* session, const char* path, char* error, size_t error_size) {
  return guarded(error, error_size, [&] {
    require(session != nullptr && path != nullptr, "session or path is NULL");
    session->session.write_trace(path);
  });
}

size_t cfmoe_session_take_events(cfmoe_session* session, cfmoe_access_event* out, size_t capacity) {
  if (session == nullptr || out == nullptr) return 0;
  std::array<cfmoe::AccessEvent, 256> batch;
  size_t count = 0;
  while (count < capacity) {
    const size_t got = session->session.take_events(std::span(batch).first(std::min(batch.size(), capacity - count)));
    if (got == 0) break;
    for (size_t i = 0; i < got; ++i) {
      const cfmoe::AccessEvent& event = batch[i];
      out[count++] = {static_cast<uint8_t>(event.phase), static_cast<uint8_t>(event.hit),
                      static_cast<uint16_t>(event.key.layer), static_cast<uint32_t>(event.key.expert), event.position};
    }
  }
  return count;
}
