// Policies that see the future, as bounds for those that do not.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/cache_policy.h"
#include "cache/recency_list.h"
#include "simulate/future.h"

namespace cfmoe {

// Keeps for each expert when it comes next.
class OraclePolicy : public CachePolicy {
 public:
  // Both outlive the policy.
  OraclePolicy(const PolicyFacts& facts, const Future& future, const Clock& clock);
  void clear() override = 0;

 protected:
  // The next access behind the clock. Accesses that nobody will make have times of their own behind all others, so that
  // no two experts share one and the order among them is fixed.
  uint32_t next_use(int32_t id);
  bool never(uint32_t use) const { return use >= future_.length(); }
  uint32_t uses() const { return future_.length() + future_.total(); }
  int32_t id_of_use(uint32_t use) const {
    return static_cast<int32_t>(never(use) ? use - future_.length() : future_.id_at(use));
  }

  PolicyFacts facts_;
  const Future& future_;
  const Clock& clock_;

 private:
  std::vector<uint32_t> upcoming_;
};

// OPT: gives up the resident whose next use lies furthest ahead (Belady, "A study of replacement algorithms for a
// virtual-storage computer", IBM Systems Journal 5(2), 1966). Always admits, as an engine must; with `bypass` it leaves
// an expert out that comes later than every resident, which bounds every policy.
class OptPolicy final : public OraclePolicy {
 public:
  OptPolicy(const PolicyFacts& facts, const Future& future, const Clock& clock, bool bypass);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool admits(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void clear() override;

 private:
  bool bypass_;
  std::vector<uint32_t> use_;  // of residents, as the set has it
  TimeSet uses_of_residents_;
};

// LOPT: OPT inside a window of the next `lookahead` accesses, LRU outside: the victim is the least recent of the
// residents that the window does not use, or, where it uses all of them, the one that it uses last.
class LoptPolicy final : public OraclePolicy {
 public:
  LoptPolicy(const PolicyFacts& facts, const Future& future, const Clock& clock, uint32_t lookahead);
  void on_access(ExpertKey key, uint64_t position) override;
  void on_insert(ExpertKey key, uint64_t position) override;
  void on_evict(ExpertKey key) override;
  bool victim(ExpertKey incoming, const Pinned& pinned, ExpertKey* out) override;
  void clear() override;

 private:
  void place(int32_t id);
  void remove(int32_t id);
  // Lets experts into the window as the clock goes on.
  void advance();

  int64_t lookahead_;
  int64_t window_end_ = 0;  // the first time behind the window
  std::vector<uint32_t> use_;
  std::vector<bool> resident_;
  RecencyList outside_;
  TimeSet inside_;
};

}  // namespace cfmoe
