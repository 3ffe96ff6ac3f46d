// The routing trace: which experts each token was routed to. docs/trace-format.md describes the file byte by byte.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cache/residency.h"

namespace cfmoe {

// A stretch of consecutive tokens of one phase.
struct TraceSegment {
  uint32_t tokens = 0;
  Phase phase = Phase::kPrefill;
  bool begins_sample = false;  // with an empty context and a cold cache
  bool hand_over = false;      // follows the segment
  uint64_t position = 0;       // of the first token in its context
};

struct Trace {
  int32_t layers = 0, experts = 0, top_k = 0;
  uint32_t chunk_size = 0;    // of prefill, in tokens; 0: not known
  uint32_t slots = 0;         // of the engine that recorded it; 0: not an engine
  uint64_t expert_bytes = 0;  // of one record; 0: not known
  std::string policy;         // of the engine; empty: not an engine
  std::vector<TraceSegment> segments;
  std::vector<uint16_t> ids;     // [token][MoE layer][k], best first
  std::vector<uint16_t> scores;  // [token][MoE layer][expert] in units of 1/65535, or empty

  uint64_t tokens() const { return ids.size() / (static_cast<size_t>(layers) * static_cast<size_t>(top_k)); }
};

// `name` is what messages call the bytes. Throws cfmoe::Error where anything contradicts the format.
Trace parse_trace(std::span<const uint8_t> bytes, const std::string& name);
std::vector<uint8_t> format_trace(const Trace& trace);
// Beside the path first, then renamed. Throws cfmoe::Error where the system refuses, or where there is no token.
void write_trace(const Trace& trace, const std::string& path);

}  // namespace cfmoe
