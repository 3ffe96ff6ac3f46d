// Decides which experts are in memory: hits, misses, victims and their order. The engine's expert cache and the
// simulator run this same code; what a decision does to memory is theirs.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "cache/cache_policy.h"
#include "cache/expert_key.h"
#include "cache/hand_over.h"

namespace cfmoe {

enum class Phase : uint8_t { kPrefill = 0, kDecode = 1 };

struct AccessCounts {
  uint64_t hits = 0;
  uint64_t misses = 0;
};

// One access, in the order of accounting. Prefill counts an expert once per (chunk, layer), decode once per (token,
// layer, k).
struct AccessEvent {
  Phase phase;
  bool hit;
  ExpertKey key;
  uint64_t position;  // of the token; in prefill of the last token of the chunk that chose the expert
};

// An expert is resident from the moment when it is decided on, whether or not its load has ended.
class Residency {
 public:
  class Actions {
   public:
    virtual ~Actions() = default;
    // The expert is resident now; a slot is free for it. One that throws leaves it resident: see drop.
    virtual void load(ExpertKey key, Phase phase) = 0;
    // The same for an expert that nobody asked for yet.
    virtual void load_ahead(ExpertKey key) { load(key, Phase::kPrefill); }
    // The expert is no longer resident; frees its slot, also where it throws.
    virtual void evict(ExpertKey key, Phase phase) = 0;
  };

  // `slots` are at least top_k and at most all experts.
  Residency(const PolicyFacts& facts, std::unique_ptr<CachePolicy> policy, Actions& actions, bool log_events);

  // What the router chose for consecutive tokens: ids [tokens * top_k] in routing order, scores [tokens * experts] or
  // empty. Comes before the accesses of those tokens.
  void note_routing(Phase phase, int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                    uint64_t first_position);

  // One (token, layer) group in top-k order: all members are pinned, members resident before are hits, and in top-k
  // order each is accounted, a miss first evicts if it must, then recency is updated. `hits[i]` says how it was.
  void decode_group(int32_t layer, std::span<const int32_t> experts, uint64_t position, std::vector<bool>* hits);

  // One MoE layer of a prefill chunk. Experts are accounted, and computed, in the order residents ascending, then
  // missing ascending, each pinned until it has been computed; a load is issued as soon as there is room. Victims
  // depend on the order of completion alone.
  class PrefillPass {
   public:
    // `experts` ascend; last_positions[i] is the last position in the chunk that chose experts[i]. Both must outlive
    // the pass.
    PrefillPass(Residency& residency, int32_t layer, std::span<const int32_t> experts,
                std::span<const uint64_t> last_positions);
    ~PrefillPass();
    PrefillPass(const PrefillPass&) = delete;
    PrefillPass& operator=(const PrefillPass&) = delete;

    size_t size() const { return order_.size(); }
    size_t issued() const { return issued_; }  // of the order's first so many the loads are issued
    size_t done() const { return done_; }
    // The n-th in order: its place in `experts`, and its key.
    size_t index(size_t n) const { return order_[n]; }
    ExpertKey key(size_t n) const { return ExpertKey{layer_, experts_[order_[n]]}; }
    // Issues loads while there is room.
    void issue();
    // The next in order has been computed.
    void complete();

   private:
    Residency& residency_;
    int32_t layer_;
    std::span<const int32_t> experts_;
    std::span<const uint64_t> last_positions_;
    std::vector<size_t> order_;
    size_t issued_ = 0, done_ = 0;
  };

  // Seeds the decode set from what prefill was routed to since the last hand-over, weighted to the last tokens; see
  // choose_hand_over. Returns how many experts it had to load.
  uint64_t hand_over();

  // Fills free slots with the absent among `experts`, the likeliest first; the policy is told of the first as the one
  // used last, at `position`. No accesses.
  void fill(std::span<const ExpertKey> experts, uint64_t position);

  // The load of a resident failed: it is absent again.
  void drop(ExpertKey key);
  // Forgets residents (without evicting them), the policy's state and noted routing: the next access is cold.
  void clear();
  // Forgets routing that waits for a hand-over.
  // Adds to the positions of events that nobody has taken yet; wraps around.
  void shift_events(uint64_t by) {
    for (AccessEvent& event : events_) event.position += by;
  }
  void forget_routing() { routing_.clear(); }
  // Evicts what no longer fits, counted as prefill. Same bounds as the constructor's.
  void resize(int32_t slots);

  bool resident(ExpertKey key) const { return entry(key).resident; }
  int32_t resident_count() const { return resident_count_; }
  const PolicyFacts& facts() const { return facts_; }
  bool wants_scores() const { return policy_->wants_scores(); }
  const AccessCounts& counts(Phase phase) const { return counts_[static_cast<size_t>(phase)]; }
  void reset_counts() { counts_ = {}; }
  std::vector<AccessEvent> take_events();

 private:
  struct Entry {
    bool resident = false;
    bool pinned = false;
  };
  // Pins experts until it goes out of scope. One at a time.
  class Pins {
   public:
    explicit Pins(Residency& residency) : residency_(residency) { residency.pinned_.clear(); }
    ~Pins() {
      for (const ExpertKey key : residency_.pinned_) residency_.entry(key).pinned = false;
    }
    Pins(const Pins&) = delete;
    Pins& operator=(const Pins&) = delete;
    void pin(ExpertKey key) {
      residency_.pinned_.push_back(key);
      residency_.entry(key).pinned = true;
    }

   private:
    Residency& residency_;
  };
  Entry& entry(ExpertKey key) { return entries_[static_cast<size_t>(facts_.id_of(key))]; }
  const Entry& entry(ExpertKey key) const { return entries_[static_cast<size_t>(facts_.id_of(key))]; }
  void check_group(int32_t layer, std::span<const int32_t> ids) const;
  bool full() const { return resident_count_ >= facts_.slots; }
  bool evict_one(ExpertKey incoming, Phase phase);
  void insert(ExpertKey key, uint64_t position, Phase phase);
  void enter(ExpertKey key, uint64_t position);
  void count(Phase phase, bool hit, ExpertKey key, uint64_t position);

  PolicyFacts facts_;
  std::unique_ptr<CachePolicy> policy_;
  Actions& actions_;
  bool log_events_;
  int32_t resident_count_ = 0;
  std::vector<Entry> entries_;
  std::vector<ExpertKey> pinned_;  // of the scope that is open
  CachePolicy::Pinned is_pinned_;
  PrefillRouting routing_;
  std::array<AccessCounts, 2> counts_;
  std::vector<AccessEvent> events_;
};

}  // namespace cfmoe
