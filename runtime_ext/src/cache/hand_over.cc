// Chooses what the decode cache starts with, from what the prompt's tokens were routed to.
#include "cache/hand_over.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "error.h"

namespace cfmoe {
namespace {

double decay(uint64_t tokens) { return std::exp2(-static_cast<double>(tokens) / kHandOverHalfLife); }

}  // namespace

PrefillRouting::PrefillRouting(int32_t layers, int32_t experts)
    : layers_(layers), experts_(experts), cells_(static_cast<size_t>(layers) * static_cast<size_t>(experts)) {}

void PrefillRouting::note(int32_t layer, std::span<const int32_t> ids, int32_t top_k, uint64_t first_position) {
  if (layer < 0 || layer >= layers_ || top_k < 1 || ids.size() % static_cast<size_t>(top_k) != 0) {
    throw Error(ErrorKind::kInternal, "hand-over: routing of MoE layer " + std::to_string(layer) + " has " +
                                          std::to_string(ids.size()) + " ids for a top_k of " + std::to_string(top_k));
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    int32_t expert = ids[i];
    if (expert < 0 || expert >= experts_)
      throw Error(ErrorKind::kInternal, "hand-over: no expert " + std::to_string(expert));
    uint64_t position = first_position + i / static_cast<size_t>(top_k);
    Cell& cell = cells_[static_cast<size_t>(layer) * static_cast<size_t>(experts_) + static_cast<size_t>(expert)];
    if (cell.score > 0 && position < cell.last_position)
      throw Error(ErrorKind::kInternal, "hand-over: positions do not ascend");
    cell.score = cell.score * decay(position - cell.last_position) + 1;
    cell.last_position = position;
    last_position_ = std::max(last_position_, position);
    empty_ = false;
  }
}

void PrefillRouting::clear() {
  std::fill(cells_.begin(), cells_.end(), Cell{});
  last_position_ = 0;
  empty_ = true;
}

std::vector<PrefillRouting::Use> PrefillRouting::uses() const {
  std::vector<Use> uses;
  for (size_t i = 0; i < cells_.size(); ++i) {
    const Cell& cell = cells_[i];
    if (cell.score <= 0) continue;
    ExpertKey key{static_cast<int32_t>(i) / experts_, static_cast<int32_t>(i) % experts_};
    uses.push_back(Use{key, cell.score * decay(last_position_ - cell.last_position), cell.last_position});
  }
  return uses;
}

std::vector<PrefillRouting::Use> choose_hand_over(const PrefillRouting& routing, int32_t slots) {
  using Use = PrefillRouting::Use;
  std::vector<Use> chosen = routing.uses();
  std::sort(chosen.begin(), chosen.end(), [](const Use& a, const Use& b) {
    return std::tie(b.score, a.key.layer, a.key.expert) < std::tie(a.score, b.key.layer, b.key.expert);
  });
  if (chosen.size() > static_cast<size_t>(std::max(slots, 0))) chosen.resize(static_cast<size_t>(std::max(slots, 0)));
  std::sort(chosen.begin(), chosen.end(), [](const Use& a, const Use& b) {
    return std::tie(a.last_position, a.key.layer, a.key.expert) < std::tie(b.last_position, b.key.layer, b.key.expert);
  });
  return chosen;
}

}  // namespace cfmoe
