// Victims by next use.
#include "simulate/oracle_policies.h"

#include <algorithm>

namespace cfmoe {

OraclePolicy::OraclePolicy(const PolicyFacts& facts, const Future& future, const Clock& clock)
    : facts_(facts), future_(future), clock_(clock), upcoming_(future.total()) {
  for (uint32_t id = 0; id < future.total(); ++id) upcoming_[id] = future.first(id);
}

uint32_t OraclePolicy::next_use(int32_t id) {
  uint32_t& upcoming = upcoming_[static_cast<size_t>(id)];
  while (upcoming != Future::kNever && int64_t{upcoming} <= clock_.now) upcoming = future_.next(upcoming);
  return upcoming < clock_.horizon ? upcoming : future_.length() + static_cast<uint32_t>(id);
}

OptPolicy::OptPolicy(const PolicyFacts& facts, const Future& future, const Clock& clock, bool bypass)
    : OraclePolicy(facts, future, clock),
      bypass_(bypass),
      use_(static_cast<size_t>(facts.total())),
      uses_of_residents_(uses()) {}

void OptPolicy::on_access(ExpertKey key, uint64_t position) {
  on_evict(key);
  on_insert(key, position);
}

void OptPolicy::on_insert(ExpertKey key, uint64_t) {
  const int32_t id = facts_.id_of(key);
  use_[static_cast<size_t>(id)] = next_use(id);
  uses_of_residents_.insert(use_[static_cast<size_t>(id)]);
}

void OptPolicy::on_evict(ExpertKey key) { uses_of_residents_.erase(use_[static_cast<size_t>(facts_.id_of(key))]); }

bool OptPolicy::admits(ExpertKey key) {
  return !bypass_ || uses_of_residents_.greatest_below(uses()) > int64_t{next_use(facts_.id_of(key))};
}

bool OptPolicy::victim(ExpertKey, const Pinned& pinned, ExpertKey* out) {
  for (int64_t use = uses(); (use = uses_of_residents_.greatest_below(static_cast<uint64_t>(use))) >= 0;) {
    *out = facts_.key_of(id_of_use(static_cast<uint32_t>(use)));
    if (!pinned(*out)) return true;
  }
  return false;
}

void OptPolicy::clear() { uses_of_residents_.clear(); }

LoptPolicy::LoptPolicy(const PolicyFacts& facts, const Future& future, const Clock& clock, uint32_t lookahead)
    : OraclePolicy(facts, future, clock),
      lookahead_(lookahead),
      use_(static_cast<size_t>(facts.total())),
      resident_(static_cast<size_t>(facts.total())),
      outside_(facts.total()),
      inside_(uses()) {}

void LoptPolicy::advance() {
  const int64_t end = std::min<int64_t>(clock_.now + 1 + lookahead_, clock_.horizon);
  for (window_end_ = std::max(window_end_, clock_.now + 1); window_end_ < end; ++window_end_) {
    const auto id = static_cast<int32_t>(future_.id_at(static_cast<uint32_t>(window_end_)));
    if (!resident_[static_cast<size_t>(id)] || use_[static_cast<size_t>(id)] != window_end_) continue;
    outside_.remove(id);
    inside_.insert(static_cast<uint64_t>(window_end_));
  }
}

void LoptPolicy::place(int32_t id) {
  const uint32_t use = use_[static_cast<size_t>(id)] = next_use(id);
  if (!never(use) && int64_t{use} < window_end_) {
    inside_.insert(use);
  } else {
    outside_.push_most_recent(id);
  }
}

void LoptPolicy::remove(int32_t id) {
  if (outside_.contains(id)) {
    outside_.remove(id);
  } else {
    inside_.erase(use_[static_cast<size_t>(id)]);
  }
}

void LoptPolicy::on_access(ExpertKey key, uint64_t) {
  advance();
  remove(facts_.id_of(key));
  place(facts_.id_of(key));
}

void LoptPolicy::on_insert(ExpertKey key, uint64_t) {
  advance();
  resident_[static_cast<size_t>(facts_.id_of(key))] = true;
  place(facts_.id_of(key));
}

void LoptPolicy::on_evict(ExpertKey key) {
  resident_[static_cast<size_t>(facts_.id_of(key))] = false;
  remove(facts_.id_of(key));
}

bool LoptPolicy::victim(ExpertKey, const Pinned& pinned, ExpertKey* out) {
  advance();
  const auto excluded = [&](int32_t id) { return pinned(facts_.key_of(id)); };
  int32_t id = outside_.least_recent(excluded);
  for (int64_t use = uses(); id < 0 && (use = inside_.greatest_below(static_cast<uint64_t>(use))) >= 0;) {
    const int32_t each = id_of_use(static_cast<uint32_t>(use));
    if (!excluded(each)) id = each;
  }
  if (id >= 0) *out = facts_.key_of(id);
  return id >= 0;
}

void LoptPolicy::clear() {
  std::fill(resident_.begin(), resident_.end(), false);
  outside_.clear();
  inside_.clear();
  window_end_ = 0;
}

}  // namespace cfmoe
