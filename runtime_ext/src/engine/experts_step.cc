// Groups the tokens of a chunk by expert, and hands the experts that are ready over in waves.
#include "engine/experts_step.h"

#include <string>

#include "error.h"

namespace cfmoe {
namespace {

constexpr int32_t kAlignedInts = 16;   // 64 bytes, for CPU kernels, which are given each list by itself
constexpr int64_t kSectionInts = 128;  // 512 bytes, for GPUs, which bind all lists at once

int64_t rounded(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Decode's lists, one per place in the top-k, follow those of prefill.
int64_t decode_list(int32_t experts, int32_t top_k, int32_t chunk) {
  return rounded(int64_t{chunk} * top_k, kAlignedInts) + int64_t{kAlignedInts} * experts;
}

}  // namespace

uint64_t ExpertLists::bytes(int32_t experts, int32_t top_k, int32_t chunk) {
  const int64_t ints = decode_list(experts, top_k, chunk) + int64_t{kAlignedInts} * top_k;
  return 2 * sizeof(int32_t) * static_cast<uint64_t>(rounded(ints, kSectionInts));
}

ExpertsStep::ExpertsStep(const ExpertsStepFacts& facts, ExpertCache& cache, const ExpertLists& lists)
    : facts_(facts), cache_(cache), lists_(lists) {
  groups_.resize(static_cast<size_t>(facts.experts));
  wave_.reserve(static_cast<size_t>(facts.experts));
  chosen_.reserve(static_cast<size_t>(facts.experts));
  last_positions_.reserve(static_cast<size_t>(facts.experts));
  const int64_t first = decode_list(facts.experts, facts.top_k, facts.chunk);
  for (int32_t k = 0; k < facts.top_k; ++k) {
    lists_.rows_in[static_cast<size_t>(first + k * kAlignedInts)] = 0;
    lists_.rows_out[static_cast<size_t>(first + k * kAlignedInts)] = k;
  }
}

// A plan may name a buffer that no router has written.
void ExpertsStep::check_ids(std::span<const int32_t> ids) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= facts_.experts)
      throw Error("plan.json: a step computes experts that were not routed; compile the artifact again");
  }
}

void ExpertsStep::group(const int32_t* ids, int64_t n, uint64_t first_position) {
  const int32_t top_k = facts_.top_k;
  const int64_t count = n * top_k;
  for (Group& g : groups_) g = {};
  check_ids({ids, static_cast<size_t>(count)});
  for (int64_t i = 0; i < count; ++i) ++groups_[ids[i]].count;
  chosen_.clear();
  last_positions_.clear();
  int32_t begin = 0;
  for (int32_t e = 0; e < facts_.experts; ++e) {
    Group& g = groups_[e];
    if (g.count == 0) continue;
    g.begin = begin;
    begin += static_cast<int32_t>(rounded(g.count, kAlignedInts));
    g.count = 0;  // counts again while the lists fill
    chosen_.push_back(e);
  }
  int32_t* rows_in = lists_.rows_in.data();
  int32_t* rows_out = lists_.rows_out.data();
  for (int64_t i = 0; i < count; ++i) {
    Group& g = groups_[ids[i]];
    rows_in[g.begin + g.count] = static_cast<int32_t>(i / top_k);
    rows_out[g.begin + g.count] = static_cast<int32_t>(i);
    ++g.count;
  }
  for (int32_t e : chosen_) {
    const Group& g = groups_[e];
    last_positions_.push_back(first_position + static_cast<uint64_t>(rows_in[g.begin + g.count - 1]));
  }
}

void ExpertsStep::prefill(int32_t layer, const ExpertsCall& call, int64_t n, uint64_t first_position,
                          const std::atomic<bool>& cancelled) {
  if (cancelled.load(std::memory_order_relaxed)) throw Error(ErrorKind::kCancelled, "cancelled");
  group(call.ids, n, first_position);
  cache_.note_routing(Phase::kPrefill, layer, {call.ids, static_cast<size_t>(n * facts_.top_k)}, call.scores,
                      first_position);
  size_t done = 0;
  cache_.prefill_layer(layer, chosen_, last_positions_, [&](std::span<const ReadyExpert> ready) {
    wave_.clear();
    int32_t used = 0;
    for (const ReadyExpert& expert : ready) {
      const Group& g = groups_[chosen_[expert.index]];
      if (used + g.count > call.scratch_rows) {
        call.compute->run(wave_, true);
        wave_.clear();
        used = 0;
      }
      wave_.push_back({expert.view, g.begin, g.count, used});
      used += g.count;
    }
    done += ready.size();
    call.compute->run(wave_, done < chosen_.size());
  });
}

void ExpertsStep::decode(int32_t layer, const ExpertsCall& call, uint64_t position) {
  const std::span<const int32_t> chosen(call.ids, static_cast<size_t>(facts_.top_k));
  check_ids(chosen);
  cache_.note_routing(Phase::kDecode, layer, chosen, call.scores, position);
  const auto first = static_cast<int32_t>(decode_list(facts_.experts, facts_.top_k, facts_.chunk));
  size_t done = 0;
  cache_.decode_group(layer, chosen, position, [&](std::span<const ReadyExpert> ready) {
    wave_.clear();
    for (const ReadyExpert& expert : ready)
      wave_.push_back({expert.view, first + expert.index * kAlignedInts, 1, expert.index});
    done += ready.size();
    call.compute->run(wave_, done < chosen.size());
  });
}

}  // namespace cfmoe
