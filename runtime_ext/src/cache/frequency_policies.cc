// Frequency counts and their decay.
#include "cache/frequency_policies.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cache/hand_over.h"

namespace cfmoe {

LfuPolicy::LfuPolicy(const PolicyFacts& facts, bool history)
    : facts_(facts), history_(history), counts_(static_cast<size_t>(facts.total())), residents_(facts.total()) {}

void LfuPolicy::on_access(ExpertKey key, uint64_t) {
  const int32_t id = facts_.id_of(key);
  residents_.set(id, Rank{++counts_[static_cast<size_t>(id)], ++tick_});
}

void LfuPolicy::on_insert(ExpertKey key, uint64_t) {
  const int32_t id = facts_.id_of(key);
  if (!history_) counts_[static_cast<size_t>(id)] = 0;
  residents_.set(id, Rank{counts_[static_cast<size_t>(id)], ++tick_});
}

void LfuPolicy::on_evict(ExpertKey key) { residents_.remove(facts_.id_of(key)); }

bool LfuPolicy::victim(ExpertKey, const Pinned& pinned, ExpertKey* out) {
  const int32_t id = residents_.least([&](int32_t each) { return pinned(facts_.key_of(each)); });
  if (id >= 0) *out = facts_.key_of(id);
  return id >= 0;
}

void LfuPolicy::clear() {
  tick_ = 0;
  std::fill(counts_.begin(), counts_.end(), 0.0);
  residents_.clear();
}

LayerLfuPolicy::LayerLfuPolicy(const PolicyFacts& facts)
    : facts_(facts),
      layers_(static_cast<size_t>(facts.layers),
              Layer{RankTree(facts.experts), std::vector<double>(static_cast<size_t>(facts.experts)), 0}) {}

// The first layers take what does not divide.
int32_t LayerLfuPolicy::share(int32_t layer) const {
  return facts_.slots / facts_.layers + (layer < facts_.slots % facts_.layers ? 1 : 0);
}

void LayerLfuPolicy::on_access(ExpertKey key, uint64_t) {
  Layer& layer = layers_[static_cast<size_t>(key.layer)];
  layer.residents.set(key.expert, Rank{++layer.counts[static_cast<size_t>(key.expert)], ++tick_});
}

void LayerLfuPolicy::on_insert(ExpertKey key, uint64_t) {
  Layer& layer = layers_[static_cast<size_t>(key.layer)];
  layer.residents.set(key.expert, Rank{layer.counts[static_cast<size_t>(key.expert)], ++tick_});
  ++layer.resident;
}

void LayerLfuPolicy::on_evict(ExpertKey key) {
  Layer& layer = layers_[static_cast<size_t>(key.layer)];
  layer.residents.remove(key.expert);
  --layer.resident;
}

bool LayerLfuPolicy::victim_of(int32_t layer, const Pinned& pinned, ExpertKey* out) const {
  const int32_t expert =
      layers_[static_cast<size_t>(layer)].residents.least([&](int32_t each) { return pinned(ExpertKey{layer, each}); });
  if (expert >= 0) *out = ExpertKey{layer, expert};
  return expert >= 0;
}

bool LayerLfuPolicy::victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) {
  const auto excess = [&](int32_t layer) { return layers_[static_cast<size_t>(layer)].resident - share(layer); };
  if (excess(incoming.layer) >= 0 && victim_of(incoming.layer, pinned, out)) return true;
  std::vector<int32_t> order(layers_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return excess(a) > excess(b); });
  return std::any_of(order.begin(), order.end(), [&](int32_t layer) { return victim_of(layer, pinned, out); });
}

void LayerLfuPolicy::clear() {
  tick_ = 0;
  for (Layer& layer : layers_) {
    layer.residents.clear();
    std::fill(layer.counts.begin(), layer.counts.end(), 0.0);
    layer.resident = 0;
  }
}

LrfuPolicy::LrfuPolicy(const PolicyFacts& facts) : facts_(facts), residents_(facts.total()) { clear(); }

void LrfuPolicy::on_route(int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t>, uint64_t position) {
  const double now = static_cast<double>(position) / kHandOverHalfLife;
  for (const int32_t expert : ids) {
    const int32_t id = facts_.id_of(ExpertKey{layer, expert});
    double& score = scores_[static_cast<size_t>(id)];
    score = now + std::log2(std::exp2(score - now) + 1.0);
    if (residents_.contains(id)) residents_.set(id, Rank{score, 0});
  }
}

void LrfuPolicy::on_insert(ExpertKey key, uint64_t) {
  const int32_t id = facts_.id_of(key);
  residents_.set(id, Rank{scores_[static_cast<size_t>(id)], 0});
}

void LrfuPolicy::on_evict(ExpertKey key) { residents_.remove(facts_.id_of(key)); }

bool LrfuPolicy::victim(ExpertKey, const Pinned& pinned, ExpertKey* out) {
  const int32_t id = residents_.least([&](int32_t each) { return pinned(facts_.key_of(each)); });
  if (id >= 0) *out = facts_.key_of(id);
  return id >= 0;
}

void LrfuPolicy::clear() {
  scores_.assign(static_cast<size_t>(facts_.total()), -std::numeric_limits<double>::infinity());
  residents_.clear();
}

}  // namespace cfmoe
