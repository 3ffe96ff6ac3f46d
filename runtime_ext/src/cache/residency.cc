// The accounting of design and documentation, in one place.
#include "cache/residency.h"

#include <algorithm>
#include <string>
#include <utility>

#include "error.h"

namespace cfmoe {

Residency::Residency(const PolicyFacts& facts, std::unique_ptr<CachePolicy> policy, Actions& actions, bool log_events)
    : facts_(facts),
      policy_(std::move(policy)),
      actions_(actions),
      log_events_(log_events),
      entries_(static_cast<size_t>(facts.total())),
      is_pinned_([this](ExpertKey key) { return entry(key).pinned; }),
      routing_(facts.layers, facts.experts) {}

void Residency::check_group(int32_t layer, std::span<const int32_t> ids) const {
  if (layer < 0 || layer >= facts_.layers)
    throw Error(ErrorKind::kInternal, "expert cache: no MoE layer " + std::to_string(layer));
  for (const int32_t id : ids) {
    if (id < 0 || id >= facts_.experts)
      throw Error(ErrorKind::kInternal, "expert cache: no expert " + std::to_string(id));
  }
}

// False if every resident is pinned.
bool Residency::evict_one(ExpertKey incoming, Phase phase) {
  ExpertKey key;
  if (!policy_->victim(incoming, is_pinned_, &key)) return false;
  drop(key);
  actions_.evict(key, phase);
  return true;
}

void Residency::enter(ExpertKey key, uint64_t position) {
  entry(key).resident = true;
  ++resident_count_;
  policy_->on_insert(key, position);
}

void Residency::insert(ExpertKey key, uint64_t position, Phase phase) {
  enter(key, position);
  actions_.load(key, phase);
}

void Residency::drop(ExpertKey key) {
  entry(key).resident = false;
  --resident_count_;
  policy_->on_evict(key);
}

void Residency::count(Phase phase, bool hit, ExpertKey key, uint64_t position) {
  AccessCounts& counts = counts_[static_cast<size_t>(phase)];
  ++(hit ? counts.hits : counts.misses);
  if (log_events_) events_.push_back(AccessEvent{phase, hit, key, position});
}

void Residency::note_routing(Phase phase, int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                             uint64_t first_position) {
  check_group(layer, ids);
  const auto top_k = static_cast<size_t>(facts_.top_k), experts = static_cast<size_t>(facts_.experts);
  if (ids.size() % top_k != 0 || (!scores.empty() && scores.size() != ids.size() / top_k * experts)) {
    throw Error(ErrorKind::kInternal, "expert cache: routing of MoE layer " + std::to_string(layer) + " has " +
                                          std::to_string(ids.size()) + " ids and " + std::to_string(scores.size()) +
                                          " scores");
  }
  if (phase == Phase::kPrefill) routing_.note(layer, ids, facts_.top_k, first_position);
  for (size_t t = 0; t < ids.size() / top_k; ++t) {
    policy_->on_route(layer, ids.subspan(t * top_k, top_k),
                      scores.empty() ? scores : scores.subspan(t * experts, experts), first_position + t);
  }
}

void Residency::decode_group(int32_t layer, std::span<const int32_t> experts, uint64_t position,
                             std::vector<bool>* hits) {
  check_group(layer, experts);
  if (experts.size() > static_cast<size_t>(facts_.slots)) {
    throw Error(ErrorKind::kInternal,
                "expert cache: a group of " + std::to_string(experts.size()) + " experts does not fit");
  }
  hits->assign(experts.size(), false);
  Pins pins(*this);
  for (size_t i = 0; i < experts.size(); ++i) {
    const ExpertKey key{layer, experts[i]};
    if (entry(key).pinned)
      throw Error(ErrorKind::kInternal, "expert cache: expert " + std::to_string(experts[i]) + " twice in a group");
    (*hits)[i] = resident(key);
    pins.pin(key);
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    const ExpertKey key{layer, experts[i]};
    count(Phase::kDecode, (*hits)[i], key, position);
    if (!(*hits)[i]) {
      if (full()) {
        if (!policy_->admits(key)) continue;
        if (!evict_one(key, Phase::kDecode))
          throw Error(ErrorKind::kInternal, "expert cache: every resident is pinned");
      }
      insert(key, position, Phase::kDecode);
    }
    policy_->on_access(key, position);
  }
}

Residency::PrefillPass::PrefillPass(Residency& residency, int32_t layer, std::span<const int32_t> experts,
                                    std::span<const uint64_t> last_positions)
    : residency_(residency), layer_(layer), experts_(experts), last_positions_(last_positions), order_(experts.size()) {
  residency.check_group(layer, experts);
  const bool ascending = std::adjacent_find(experts.begin(), experts.end(), std::greater_equal<>()) == experts.end();
  if (experts.size() != last_positions.size() || !ascending) {
    throw Error(ErrorKind::kInternal,
                "expert cache: the experts of a prefill layer are not ascending or lack positions");
  }
  for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
  const auto first_missing = std::stable_partition(
      order_.begin(), order_.end(), [&](size_t i) { return residency.resident(ExpertKey{layer, experts[i]}); });
  issued_ = static_cast<size_t>(first_missing - order_.begin());
  for (size_t n = 0; n < order_.size(); ++n) {
    residency.count(Phase::kPrefill, n < issued_, key(n), last_positions[order_[n]]);
    if (n < issued_) residency.entry(key(n)).pinned = true;
  }
}

Residency::PrefillPass::~PrefillPass() {
  for (size_t n = done_; n < issued_; ++n) residency_.entry(key(n)).pinned = false;
}

void Residency::PrefillPass::issue() {
  while (issued_ < order_.size()) {
    if (residency_.full() && !residency_.evict_one(key(issued_), Phase::kPrefill)) return;
    const size_t n = issued_++;
    residency_.entry(key(n)).pinned = true;
    residency_.insert(key(n), last_positions_[order_[n]], Phase::kPrefill);
  }
}

void Residency::PrefillPass::complete() {
  residency_.policy_->on_access(key(done_), last_positions_[order_[done_]]);
  residency_.entry(key(done_)).pinned = false;
  ++done_;
  issue();
}

uint64_t Residency::hand_over() {
  if (routing_.empty()) return 0;
  const std::vector<PrefillRouting::Use> chosen = choose_hand_over(routing_, facts_.slots);
  routing_.clear();
  // Residents that were not chosen keep what room is left, as the policy ranks them.
  Pins pins(*this);
  std::vector<PrefillRouting::Use> absent;
  for (const PrefillRouting::Use& use : chosen) {
    pins.pin(use.key);
    if (!resident(use.key)) absent.push_back(use);
  }
  // The reads start with the likeliest experts, so that decode seldom waits; the policy is told of all in the order of
  // their last use.
  std::stable_sort(absent.begin(), absent.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  for (const PrefillRouting::Use& use : absent) {
    if (full() && !evict_one(use.key, Phase::kPrefill))
      throw Error(ErrorKind::kInternal, "hand-over: every resident is pinned");
    insert(use.key, use.last_position, Phase::kPrefill);
  }
  for (const PrefillRouting::Use& use : chosen) policy_->on_access(use.key, use.last_position);
  return absent.size();
}

void Residency::fill(std::span<const ExpertKey> experts, uint64_t position) {
  std::vector<ExpertKey> filled;
  for (const ExpertKey key : experts) {
    check_group(key.layer, {&key.expert, 1});
    if (full() || resident(key)) continue;
    enter(key, position);
    filled.push_back(key);
    actions_.load_ahead(key);
  }
  for (auto key = filled.rbegin(); key != filled.rend(); ++key) policy_->on_access(*key, position);
}

void Residency::clear() {
  std::fill(entries_.begin(), entries_.end(), Entry{});
  resident_count_ = 0;
  policy_->clear();
  routing_.clear();
}

void Residency::resize(int32_t slots) {
  while (resident_count_ > slots) {
    if (!evict_one(ExpertKey{}, Phase::kPrefill))
      throw Error(ErrorKind::kInternal, "expert cache: every resident is pinned");
  }
  facts_.slots = slots;
  policy_->resize(slots);
}

std::vector<AccessEvent> Residency::take_events() { return std::exchange(events_, {}); }

}  // namespace cfmoe
