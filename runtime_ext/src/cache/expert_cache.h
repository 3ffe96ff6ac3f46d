// Keeps a policy-managed set of experts in memory and streams the others through it, one MoE layer at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache/expert_view.h"
#include "cache/residency.h"
#include "store/expert_store.h"

namespace cfmoe {

class TraceRecorder;

// One expert that is in memory and may be computed: `index` is its place in the span given to prefill_layer or
// decode_group.
struct ReadyExpert {
  int32_t index = 0;
  ExpertView view;
};

struct PhaseMetrics {
  uint64_t hits = 0;
  uint64_t misses = 0;
  uint64_t prefetched = 0;  // experts read ahead, which nobody had asked for when their read began; counted as prefill
  uint64_t bytes_read = 0;  // counted where the read returns, from real reads; with mmap the records faulted in
  uint64_t stall_ns = 0;    // time that the computing thread waited for a load
};

struct ExpertCacheOptions {
  int32_t slots = 0;  // at least top_k
  std::string policy = kDefaultPolicy;
  int32_t io_threads = 2;
  bool log_events = false;
  TraceRecorder* recorder = nullptr;  // told of all routing; outlives the cache
  SlabSource* slabs = nullptr;        // of a device's memory; outlives the cache
};

// Not thread safe: one caller. Reads run on the cache's own I/O threads.
class ExpertCache {
 public:
  using ComputeFn = std::function<void(std::span<const ReadyExpert>)>;

  // Throws cfmoe::Error (user error) where slots < top_k or the policy is unknown.
  ExpertCache(ExpertStore& store, int32_t top_k, const ExpertCacheOptions& options);
  ~ExpertCache();

  // Runs `compute` for every expert in `experts` (ascending ids, distinct), residents first, each exactly once, on the
  // calling thread, while the others load. `last_positions[i]` is the last position in this chunk that chose
  // experts[i]. Each is read at most once. Victims depend on the order of the calls alone, never on how fast loads
  // complete: experts are inserted and completed in the order residents ascending, then missing ascending, in which
  // they are accounted too; loads are issued whenever completing one expert leaves a resident that is not needed later.
  void prefill_layer(int32_t layer, std::span<const int32_t> experts, std::span<const uint64_t> last_positions,
                     const ComputeFn& compute);

  // What the router chose for consecutive tokens; see Residency::note_routing. Comes before prefill_layer or
  // decode_group of those tokens.
  void note_routing(Phase phase, int32_t layer, std::span<const int32_t> ids, std::span<const uint16_t> scores,
                    uint64_t first_position);
  // Whether note_routing needs the scores of all experts.
  bool wants_scores() const;

  // Seeds the decode set from the noted routing, weighted to the last tokens. Reads of chosen experts that are absent
  // are started in the background and count as prefill; a decode access that meets one still loading is a hit that
  // waits.
  void hand_over();

  // One (token, layer) group in top-k order. Hits are computed in one batch while misses load; misses follow in batches
  // as they arrive. In top-k order each member is accounted, a miss first evicts if it must, then recency is updated.
  void decode_group(int32_t layer, std::span<const int32_t> experts, uint64_t position, const ComputeFn& compute);

  // Keeps the cache warm from now on. A conversation begins with what the one before left in memory, and free slots,
  // now and after a resize, are filled with the absent among `experts`, the likeliest first: they are resident at once,
  // and read while no other read is under way, or at once where one is wanted. So neither hits nor victims depend on
  // how far reading ahead has come. Given again, the new list replaces what of the old one is not read yet.
  void keep_warm(std::vector<ExpertKey> experts);
  // While held back, reading ahead begins no read: it takes from computing.
  void hold_ahead(bool held);
  // The next access is cold, unless the cache is kept warm. Throws as drain does where it is not.
  void begin_conversation();
  // The next token is at `position` of the conversation, which has read no fewer; what is in memory stays.
  void rewind(uint64_t position);

  // Waits until no read is under way. Throws the first error of a background read that nobody has met yet.
  void drain();
  // Forgets residents, policy state and noted routing: the next access is cold.
  void clear();
  // Changes the number of slots while no expert is in use; shrinking gives memory back to the system at once.
  void resize(int32_t slots);

  PhaseMetrics metrics(Phase phase) const;
  void reset_metrics();
  std::vector<AccessEvent> take_events();
  // Writes for each expert, [layers * experts] as far as `out` goes, 1 if it is resident and its read has begun, else
  // 0.
  void residents(std::span<uint8_t> out) const;
  // Residents of a MoE layer, ascending.
  std::vector<int32_t> residents(int32_t layer) const;
  // Never more than there are experts.
  int32_t slots() const;
  // Bytes of pool memory (0 with mmap, where the mapped file is used in place).
  uint64_t pool_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cfmoe
