// The caches of the literature in the obvious way, on traces of the shape of FakeStore's experts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "fake_store.h"
#include "simulate/simulator.h"

namespace cfmoe::test {

// One stream of accesses, as the reference takes a trace: whether each is a hit, by a function that is told what is
// resident, with the least recent first, and where it stands, and names the victim; -1 leaves the expert out.
class NaiveReference {
 public:
  struct State {
    const std::vector<int32_t>& stream;
    size_t now, end;  // of the part of the stream that the cache lives through
    const std::vector<int32_t>& residents;
    const std::map<int32_t, int>& uses;  // since it became resident last
    size_t next(int32_t id, size_t behind) const {
      const auto begin = stream.begin() + static_cast<ptrdiff_t>(behind) + 1,
                 last = stream.begin() + static_cast<ptrdiff_t>(end);
      const auto found = std::find(begin, last, id);
      return found == last ? stream.size() : static_cast<size_t>(found - stream.begin());
    }
  };
  using Victim = std::function<int32_t(const State&)>;

  NaiveReference(const Trace& trace, bool warm) : trace_(trace) {
    const size_t layers = kManyLayers, width = layers * kTopK;
    for (size_t i = 0; i < trace.ids.size(); ++i)
      stream_.push_back(static_cast<int32_t>(i % width / kTopK) * kManyExperts + trace.ids[i]);
    size_t token = 0;
    for (const TraceSegment& segment : trace.segments) {
      if (segment.begins_sample && (token == 0 || !warm)) begins_.push_back(token * width);
      token += segment.tokens;
    }
    begins_.push_back(stream_.size());
  }

  Simulation run(size_t slots, const Victim& victim) const {
    std::vector<bool> hits(stream_.size());
    for (size_t part = 0; part + 1 < begins_.size(); ++part) {
      std::vector<int32_t> residents;
      std::map<int32_t, int> uses;
      for (size_t now = begins_[part]; now < begins_[part + 1]; ++now) {
        const int32_t id = stream_[now];
        const auto place = std::find(residents.begin(), residents.end(), id);
        hits[now] = place != residents.end();
        if (hits[now]) {
          residents.erase(place);
        } else {
          if (slots == 0) continue;
          if (residents.size() == slots) {
            const int32_t out = victim(State{stream_, now, begins_[part + 1], residents, uses});
            if (out < 0) continue;
            residents.erase(std::find(residents.begin(), residents.end(), out));
          }
          uses[id] = 0;
        }
        ++uses[id];
        residents.push_back(id);
      }
    }
    return count(hits);
  }

  // Distinct experts of each part.
  uint64_t compulsory() const {
    uint64_t distinct = 0;
    for (size_t part = 0; part + 1 < begins_.size(); ++part)
      distinct += std::set<int32_t>(stream_.begin() + static_cast<ptrdiff_t>(begins_[part]),
                                    stream_.begin() + static_cast<ptrdiff_t>(begins_[part + 1]))
                      .size();
    return distinct;
  }

 private:
  Simulation count(const std::vector<bool>& hits) const {
    Simulation result;
    result.decode_groups_by_misses.assign(kTopK + 1, 0);
    size_t access = 0;
    for (const TraceSegment& segment : trace_.segments) {
      AccessCounts& counts = segment.phase == Phase::kPrefill ? result.prefill : result.decode;
      for (size_t group = 0; group < size_t{segment.tokens} * kManyLayers; ++group) {
        size_t misses = 0;
        for (int32_t k = 0; k < kTopK; ++k) misses += hits[access++] ? 0 : 1;
        counts.misses += misses;
        counts.hits += kTopK - misses;
        if (segment.phase == Phase::kDecode) ++result.decode_groups_by_misses[misses];
      }
    }
    return result;
  }

  const Trace& trace_;
  std::vector<int32_t> stream_;
  std::vector<size_t> begins_;
};

inline int32_t naive_lru(const NaiveReference::State& state) { return state.residents.front(); }

inline int32_t naive_belady(const NaiveReference::State& state) {
  return *std::max_element(state.residents.begin(), state.residents.end(),
                           [&](int32_t a, int32_t b) { return state.next(a, state.now) < state.next(b, state.now); });
}

inline int32_t naive_belady_bypass(const NaiveReference::State& state) {
  const int32_t furthest = naive_belady(state);
  return state.next(furthest, state.now) > state.next(state.stream[state.now], state.now) ? furthest : -1;
}

inline NaiveReference::Victim naive_lopt(size_t lookahead) {
  return [lookahead](const NaiveReference::State& state) {
    for (const int32_t id : state.residents) {
      const size_t next = state.next(id, state.now);
      if (next == state.stream.size() || next > state.now + lookahead) return id;
    }
    return naive_belady(state);
  };
}

inline int32_t naive_lfu(const NaiveReference::State& state) {
  return *std::min_element(state.residents.begin(), state.residents.end(),
                           [&](int32_t a, int32_t b) { return state.uses.at(a) < state.uses.at(b); });
}

}  // namespace cfmoe::test
