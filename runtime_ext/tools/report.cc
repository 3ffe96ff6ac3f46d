// The C API's structs as JSON objects.
#include "report.h"

#include <fstream>
#include <string>
#include <vector>

namespace cfmoe::tools {
namespace {

JsonObject phase_json(const cfmoe_phase_metrics& phase) {
  JsonObject out;
  const uint64_t accesses = phase.hits + phase.misses;
  out.add("tokens", phase.tokens)
      .add("seconds", phase.seconds)
      .add("tokens_per_s", phase.seconds > 0 ? static_cast<double>(phase.tokens) / phase.seconds : 0.0)
      .add("hits", phase.hits)
      .add("misses", phase.misses)
      .add("chr", accesses > 0 ? static_cast<double>(phase.hits) / static_cast<double>(accesses) : 0.0)
      .add("prefetched", phase.prefetched)
      .add("bytes_read", phase.bytes_read)
      .add("stall_ms", phase.stall_ms);
  return out;
}

}  // namespace

ResidentMemory resident_memory() {
  ResidentMemory memory;
  std::ifstream status("/proc/self/status");
  std::string word;
  uint64_t kib = 0;
  while (status >> word) {
    if (word == "VmHWM:" && status >> kib) memory.peak = kib << 10;
    if (word == "VmRSS:" && status >> kib) memory.now = kib << 10;
  }
  return memory;
}

JsonObject model_json(const cfmoe_engine* engine) {
  cfmoe_model_info model = {};
  cfmoe_engine_model(engine, &model);
  JsonObject out;
  out.add("vocab_size", model.vocab_size)
      .add("context_size", model.context_size)
      .add("num_layers", model.num_layers)
      .add("moe_layers", model.moe_layers)
      .add("num_experts", model.num_experts)
      .add("top_k", model.top_k)
      .add("prefill_chunk", model.prefill_chunk)
      .add("expert_record_bytes", model.expert_record_bytes);
  return out;
}

JsonObject memory_json(const cfmoe_engine* engine) {
  cfmoe_memory memory = {};
  cfmoe_engine_memory(engine, &memory);
  const ResidentMemory resident = resident_memory();
  JsonObject out;
  out.add("budget_bytes", memory.budget_bytes)
      .add("smallest_budget_bytes", memory.smallest_budget_bytes)
      .add("largest_budget_bytes", memory.largest_budget_bytes)
      .add("weights_bytes", memory.weights_bytes)
      .add("kv_bytes", memory.kv_bytes)
      .add("workspace_bytes", memory.workspace_bytes)
      .add("pool_bytes", memory.pool_bytes)
      .add("arena_bytes", memory.arena_bytes)
      .add("mapped_bytes", memory.mapped_bytes)
      .add("expert_slots", memory.expert_slots)
      .add("expert_total", memory.expert_total)
      .add("rss_bytes", resident.now)
      .add("peak_rss_bytes", resident.peak);
  return out;
}

JsonObject metrics_json(const cfmoe_session* session) {
  cfmoe_metrics metrics = {};
  cfmoe_session_metrics(session, &metrics);
  JsonObject out;
  out.add("prefill", phase_json(metrics.prefill))
      .add("decode", phase_json(metrics.decode))
      .add("first_32_hits", metrics.first_32_hits)
      .add("first_32_accesses", metrics.first_32_accesses);
  return out;
}

std::string residents_json(const cfmoe_engine* engine) {
  cfmoe_model_info model = {};
  cfmoe_engine_model(engine, &model);
  std::vector<uint8_t> residents(cfmoe_engine_residents(engine, nullptr, 0));
  cfmoe_engine_residents(engine, residents.data(), residents.size());
  std::string out = "[";
  for (size_t layer = 0; layer < model.moe_layers; ++layer) {
    out += layer == 0 ? "\"" : ", \"";
    for (size_t expert = 0; expert < model.num_experts; ++expert)
      out += residents[layer * model.num_experts + expert] != 0 ? '1' : '0';
    out += '"';
  }
  return out + "]";
}

}  // namespace cfmoe::tools
