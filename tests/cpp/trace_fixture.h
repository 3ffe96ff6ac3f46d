// Random routing traces, and the means to damage their bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "artifact/checksum.h"
#include "trace/trace.h"

namespace cfmoe::test {

inline constexpr size_t kTraceHeader = 128, kTraceDigest = 96, kTraceSeal = 104;

// Segments of a conversation: each turn is a prompt, hand-over and some decoded tokens; 0 leaves a part out.
inline std::vector<TraceSegment> conversation(const std::vector<std::pair<uint32_t, uint32_t>>& turns) {
  std::vector<TraceSegment> segments;
  uint64_t position = 0;
  for (const auto& [prompt, decoded] : turns) {
    if (prompt > 0) segments.push_back({prompt, Phase::kPrefill, position == 0, true, position});
    position += prompt;
    if (decoded > 0) segments.push_back({decoded, Phase::kDecode, position == 0, false, position});
    position += decoded;
  }
  return segments;
}

inline std::vector<TraceSegment> joined(std::vector<TraceSegment> segments, const std::vector<TraceSegment>& more) {
  segments.insert(segments.end(), more.begin(), more.end());
  return segments;
}

struct TraceShape {
  int32_t layers = 3, experts = 8, top_k = 2;
  bool scores = true;
};

// Of consecutive tokens, most keep some of their experts.
inline Trace random_trace(const TraceShape& shape, const std::vector<TraceSegment>& segments, uint64_t seed) {
  std::mt19937_64 random(seed);
  Trace trace;
  trace.layers = shape.layers;
  trace.experts = shape.experts;
  trace.top_k = shape.top_k;
  trace.segments = segments;
  const auto layers = static_cast<size_t>(shape.layers), experts = static_cast<size_t>(shape.experts);
  std::vector<std::vector<uint16_t>> order(layers, std::vector<uint16_t>(experts));
  for (std::vector<uint16_t>& each : order) {
    std::iota(each.begin(), each.end(), uint16_t{0});
    std::shuffle(each.begin(), each.end(), random);
  }
  const uint64_t tokens =
      std::accumulate(segments.begin(), segments.end(), uint64_t{0},
                      [](uint64_t sum, const TraceSegment& segment) { return sum + segment.tokens; });
  for (uint64_t token = 0; token < tokens; ++token) {
    for (std::vector<uint16_t>& each : order) {
      for (int swaps = static_cast<int>(random() % 3); swaps > 0; --swaps)
        std::swap(each[random() % static_cast<uint64_t>(shape.top_k)], each[random() % experts]);
      trace.ids.insert(trace.ids.end(), each.begin(), each.begin() + shape.top_k);
      if (!shape.scores) continue;
      // Scores fall in the order of preference, and are noisy.
      std::vector<uint16_t> scores(experts);
      for (size_t place = 0; place < experts; ++place)
        scores[each[place]] = static_cast<uint16_t>((60000 >> std::min<size_t>(place, 12)) + random() % 2000);
      trace.scores.insert(trace.scores.end(), scores.begin(), scores.end());
    }
  }
  return trace;
}

// The trace's first `tokens` tokens; what follows a segment that is cut does not follow.
inline Trace first_tokens(const Trace& trace, uint32_t tokens) {
  Trace out = trace;
  out.segments.clear();
  uint32_t left = tokens;
  for (TraceSegment segment : trace.segments) {
    if (left == 0) break;
    if (segment.tokens > left) {
      segment.tokens = left;
      segment.hand_over = false;
    }
    left -= segment.tokens;
    out.segments.push_back(segment);
  }
  const auto layers = static_cast<size_t>(trace.layers);
  out.ids.resize(tokens * layers * static_cast<size_t>(trace.top_k));
  if (!trace.scores.empty()) out.scores.resize(tokens * layers * static_cast<size_t>(trace.experts));
  return out;
}

template <typename T>
void put(std::vector<uint8_t>* bytes, size_t offset, T value) {
  std::memcpy(bytes->data() + offset, &value, sizeof value);
}

// Makes both digests fit again, as far as there are bytes for them.
inline void reseal(std::vector<uint8_t>* bytes) {
  if (bytes->size() < kTraceHeader) return;
  put(bytes, kTraceDigest, xxh3_64(bytes->data() + kTraceHeader, bytes->size() - kTraceHeader));
  put(bytes, kTraceSeal, xxh3_64(bytes->data(), kTraceSeal));
}

}  // namespace cfmoe::test
