// Gathers a routing trace while the engine runs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trace/trace.h"

namespace cfmoe {

class TraceRecorder {
 public:
  // `trace` carries the header's facts and nothing else.
  TraceRecorder(Trace trace, bool scores) : trace_(std::move(trace)), scores_(scores) {}

  bool wants_scores() const { return scores_; }
  // What one layer's router chose for consecutive tokens; layers come in ascending order, the last completes the pass.
  // A pass that was cancelled before its last layer leaves no trace.
  void note(Phase phase, int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
            uint64_t first_position);
  void note_hand_over();
  // The next token begins a sample.
  void begin_sample() { sample_begins_ = true; }
  // The engine's slots have changed: no one number describes the trace any more.
  void forget_slots() { trace_.slots = 0; }
  const Trace& trace() const { return trace_; }

 private:
  void complete(Phase phase, uint32_t tokens, uint64_t first_position);

  Trace trace_;
  bool scores_;
  bool sample_begins_ = true;
  std::vector<std::vector<uint16_t>> pass_ids_, pass_scores_;  // of the pass under way, per layer [token][…]
};

}  // namespace cfmoe
