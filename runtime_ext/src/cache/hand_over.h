// Chooses what the decode cache starts with, from what the prompt's tokens were routed to.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cache/expert_key.h"

namespace cfmoe {

// After this many tokens a use counts half. Routing of text stays on topic for a sentence or two, and a token's first
// successors look most like the prompt's end: 32 tokens are about a sentence, and the uses of the last hundred tokens
// make nine tenths of a score.
inline constexpr double kHandOverHalfLife = 32.0;

// What a prompt used: per expert its score, the sum over its uses of 0.5^((last_position - position) / half-life), kept
// up to date in place so that a long prompt costs no memory.
class PrefillRouting {
 public:
  PrefillRouting(int32_t layers, int32_t experts);

  // `ids` is [tokens * top_k] in routing order; the first token is at `first_position`. Positions of one layer must
  // ascend over the calls.
  void note(int32_t layer, std::span<const int32_t> ids, int32_t top_k, uint64_t first_position);
  void clear();
  bool empty() const { return empty_; }

  struct Use {
    ExpertKey key;
    double score;
    uint64_t last_position;
  };
  // Every expert that was used, by (layer, expert), scored as of the last noted position.
  std::vector<Use> uses() const;

 private:
  struct Cell {
    double score = 0;  // as of last_position
    uint64_t last_position = 0;
  };
  int32_t layers_, experts_;
  bool empty_ = true;
  uint64_t last_position_ = 0;
  std::vector<Cell> cells_;
};

// The `slots` experts of the highest score (ties: lower layer, then lower expert), least recent first (by last use,
// then layer, then expert): the order in which a policy is told of them.
std::vector<PrefillRouting::Use> choose_hand_over(const PrefillRouting& routing, int32_t slots);

}  // namespace cfmoe
