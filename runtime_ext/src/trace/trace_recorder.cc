// From layer after layer to token after token.
#include "trace/trace_recorder.h"

#include <algorithm>

namespace cfmoe {

void TraceRecorder::note(Phase phase, int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                         uint64_t first_position) {
  if (layer == 0) {
    pass_ids_.clear();
    pass_scores_.clear();
  }
  if (static_cast<size_t>(layer) != pass_ids_.size()) return;
  pass_ids_.emplace_back(ids.begin(), ids.end());
  if (scores_) pass_scores_.emplace_back(scores.begin(), scores.end());
  if (layer + 1 == trace_.layers)
    complete(phase, static_cast<uint32_t>(ids.size() / static_cast<size_t>(trace_.top_k)), first_position);
}

void TraceRecorder::complete(Phase phase, uint32_t tokens, uint64_t first_position) {
  const auto append = [&](const std::vector<std::vector<uint16_t>>& layers, size_t width, std::vector<uint16_t>& out) {
    for (size_t token = 0; token < tokens; ++token) {
      for (const std::vector<uint16_t>& layer : layers) {
        const auto begin = layer.begin() + static_cast<ptrdiff_t>(token * width);
        out.insert(out.end(), begin, begin + static_cast<ptrdiff_t>(width));
      }
    }
  };
  append(pass_ids_, static_cast<size_t>(trace_.top_k), trace_.ids);
  if (scores_) append(pass_scores_, static_cast<size_t>(trace_.experts), trace_.scores);
  pass_ids_.clear();
  pass_scores_.clear();
  // Chunks of one prompt become one segment. A segment can only grow by whole chunks: whether two full chunks came from
  // one call or from two makes no difference to the cache.
  if (!sample_begins_ && !trace_.segments.empty()) {
    TraceSegment& last = trace_.segments.back();
    const bool whole = phase == Phase::kDecode || (!last.hand_over && last.tokens % trace_.chunk_size == 0);
    if (last.phase == phase && whole && last.position + last.tokens == first_position) {
      last.tokens += tokens;
      return;
    }
  }
  trace_.segments.push_back(TraceSegment{tokens, phase, sample_begins_, false, first_position});
  sample_begins_ = false;
}

void TraceRecorder::note_hand_over() {
  if (sample_begins_ || trace_.segments.empty()) return;
  TraceSegment& last = trace_.segments.back();
  if (last.phase == Phase::kPrefill) last.hand_over = true;
}

}  // namespace cfmoe
