// Keeps a policy-managed set of experts in memory and streams the others through it.
//
// What is resident, Residency decides; here are the slots, the reads and the waiting. A read begins when its expert
// becomes resident, and whoever needs the record waits for it (`settle`); a read that failed makes its expert absent
// again and its slot free.
#include "cache/expert_cache.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>

#include "cache/expert_pool.h"
#include "cache/io_queue.h"
#include "error.h"
#include "trace/trace_recorder.h"

namespace cfmoe {
namespace {

// While loads wait for room, residents are computed in small batches: each batch that is done makes room, so reading
// goes on beside compute.
constexpr size_t kBatchWhileBlocked = 4;

struct Load {
  IoQueue::JobPtr job;
  void* mapped = nullptr;  // mmap: written by the job
};

// Where a resident expert is.
struct Place {
  int32_t slot = -1;
  void* mapped = nullptr;
  std::shared_ptr<Load> load;  // not null until someone has seen it done
};

class StallTimer {
 public:
  explicit StallTimer(uint64_t* total) : total_(total), begin_(std::chrono::steady_clock::now()) {}
  ~StallTimer() {
    auto passed = std::chrono::steady_clock::now() - begin_;
    *total_ += static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count());
  }

 private:
  uint64_t* total_;
  std::chrono::steady_clock::time_point begin_;
};

int32_t checked_slots(int32_t slots, int32_t top_k, int32_t total) {
  if (slots < top_k) {
    throw Error("a cache of " + std::to_string(slots) + " experts is smaller than the " + std::to_string(top_k) +
                " that one token needs in one layer; use at least " + std::to_string(top_k));
  }
  return std::min(slots, total);
}

PolicyFacts policy_facts(const ExpertIndex& index, int32_t top_k, int32_t slots) {
  return {index.layers, index.experts, top_k, checked_slots(slots, top_k, index.layers * index.experts)};
}

}  // namespace

struct ExpertCache::Impl final : Residency::Actions {
  Impl(ExpertStore& the_store, const PolicyFacts& facts, const ExpertCacheOptions& options)
      : store(the_store),
        recorder(options.recorder),
        slabs(options.slabs),
        places(static_cast<size_t>(facts.total())),
        residency(facts, make_policy(options.policy, facts), *this, options.log_events),
        queue(options.io_threads) {
    const uint64_t stride = store.index().record_stride;
    if (slabs != nullptr) {
      pool = std::make_unique<ExpertPool>(stride, facts.slots, *slabs);
    } else if (store.mode() != IoMode::kMmap) {
      pool = std::make_unique<ExpertPool>(stride, facts.slots);
    }
  }

  void load(ExpertKey key, Phase phase) override;
  void evict(ExpertKey key, Phase phase) override;

  Place& place(ExpertKey key) { return places[static_cast<size_t>(residency.facts().id_of(key))]; }
  PhaseMetrics& of(Phase phase) { return phase_metrics[static_cast<size_t>(phase)]; }
  bool ready(ExpertKey key);
  void settle(ExpertKey key, Phase phase);
  void settle_all(Phase phase);
  void release(ExpertKey key);
  ExpertView view(ExpertKey key);
  std::vector<ExpertKey> residents() const;

  ExpertStore& store;
  TraceRecorder* const recorder;
  SlabSource* const slabs;
  std::vector<Place> places;  // [layers * experts]
  Residency residency;
  std::unique_ptr<ExpertPool> pool;  // null with mmap in the host's memory
  std::array<PhaseMetrics, 2> phase_metrics;
  std::array<std::atomic<uint64_t>, 2> bytes_read{};  // by I/O threads
  std::vector<bool> hits;                             // of the group under way
  IoQueue queue;                                      // last: its threads stop before what they write to goes away
};

void ExpertCache::Impl::load(ExpertKey key, Phase phase) {
  auto load = std::make_shared<Load>();
  std::atomic<uint64_t>& bytes = bytes_read[static_cast<size_t>(phase)];
  if (pool) {
    place(key).slot = pool->acquire();
    if (place(key).slot < 0) throw Error(ErrorKind::kInternal, "expert cache: the pool has no free slot");
    const ExpertView where = view(key);
    if (slabs != nullptr) {
      load->job = queue.submit([this, key, where, &bytes] {
        slabs->fill(*where.slab, static_cast<uint64_t>(where.word_offset) * 4, store.index().record_bytes,
                    [&](void* destination) { bytes += store.read(key, destination); });
      });
    } else {
      void* destination = static_cast<int32_t*>(where.base) + where.word_offset;
      load->job = queue.submit([this, key, destination, &bytes] { bytes += store.read(key, destination); });
    }
  } else {
    // A plain pointer: the job must not keep the load alive that holds it, and `settle` keeps the load until the job is
    // done.
    Load* target = load.get();
    load->job = queue.submit([this, key, target, &bytes] {
      target->mapped = store.map(key);
      bytes += store.index().record_bytes;
    });
  }
  place(key).load = std::move(load);
}

// The slot is not free to be written before the read into it has ended, and the device has no more use of it.
void ExpertCache::Impl::evict(ExpertKey key, Phase phase) {
  try {
    if (const std::shared_ptr<Load> load = place(key).load) {
      StallTimer stall(&of(phase).stall_ns);
      queue.wait(load->job);
    }
    if (slabs != nullptr) slabs->quiesce();
  } catch (...) {
    release(key);
    throw;
  }
  release(key);
}

// Only for an expert whose read has ended.
void ExpertCache::Impl::release(ExpertKey key) {
  if (pool) {
    pool->release(place(key).slot);
  } else {
    store.unmap(key);
  }
  place(key) = Place{};
}

bool ExpertCache::Impl::ready(ExpertKey key) {
  const std::shared_ptr<Load>& load = place(key).load;
  return !load || queue.done(load->job);
}

void ExpertCache::Impl::settle(ExpertKey key, Phase phase) {
  Place& target = place(key);
  if (!target.load) return;
  try {
    StallTimer stall(&of(phase).stall_ns);
    queue.wait(target.load->job);
  } catch (...) {
    residency.drop(key);
    release(key);
    throw;
  }
  target.mapped = target.load->mapped;
  target.load.reset();
}

std::vector<ExpertKey> ExpertCache::Impl::residents() const {
  std::vector<ExpertKey> keys;
  for (int32_t id = 0; id < residency.facts().total(); ++id) {
    const ExpertKey key = residency.facts().key_of(id);
    if (residency.resident(key)) keys.push_back(key);
  }
  return keys;
}

// Settles every expert, so that all failed loads are forgotten; throws the first error.
void ExpertCache::Impl::settle_all(Phase phase) {
  std::exception_ptr first;
  for (const ExpertKey key : residents()) {
    try {
      settle(key, phase);
    } catch (...) {
      if (!first) first = std::current_exception();
    }
  }
  if (first) std::rethrow_exception(first);
}

ExpertView ExpertCache::Impl::view(ExpertKey key) {
  if (pool) return pool->view(place(key).slot);
  return ExpertView{place(key).mapped, static_cast<int64_t>(store.index().record_stride / 4), 0};
}

ExpertCache::ExpertCache(ExpertStore& store, int32_t top_k, const ExpertCacheOptions& options)
    : impl_(std::make_unique<Impl>(store, policy_facts(store.index(), top_k, options.slots), options)) {}

ExpertCache::~ExpertCache() = default;

void ExpertCache::note_routing(Phase phase, int32_t layer, std::span<const int32_t> ids,
                               std::span<const uint16_t> scores, uint64_t first_position) {
  if (impl_->recorder != nullptr) impl_->recorder->note(phase, layer, ids, scores, first_position);
  impl_->residency.note_routing(phase, layer, ids, scores, first_position);
}

bool ExpertCache::wants_scores() const {
  return impl_->residency.wants_scores() || (impl_->recorder != nullptr && impl_->recorder->wants_scores());
}

void ExpertCache::prefill_layer(int32_t layer, std::span<const int32_t> experts,
                                std::span<const uint64_t> last_positions, const ComputeFn& compute) {
  Impl& cache = *impl_;
  Residency::PrefillPass pass(cache.residency, layer, experts, last_positions);
  pass.issue();
  std::vector<ReadyExpert> batch;
  while (pass.done() < pass.size()) {
    const size_t limit = pass.issued() < pass.size() ? kBatchWhileBlocked : pass.size();
    batch.clear();
    for (size_t n = pass.done(); n < pass.issued() && batch.size() < limit; ++n) {
      const ExpertKey key = pass.key(n);
      if (n > pass.done() && !cache.ready(key)) break;
      cache.settle(key, Phase::kPrefill);
      batch.push_back(ReadyExpert{static_cast<int32_t>(pass.index(n)), cache.view(key)});
    }
    compute(batch);
    // One at a time, whatever the batch was: then the victims do not depend on which loads happened to arrive together.
    for (size_t n = 0; n < batch.size(); ++n) pass.complete();
  }
}

void ExpertCache::hand_over() {
  if (impl_->recorder != nullptr) impl_->recorder->note_hand_over();
  impl_->residency.hand_over();
}

void ExpertCache::decode_group(int32_t layer, std::span<const int32_t> experts, uint64_t position,
                               const ComputeFn& compute) {
  Impl& cache = *impl_;
  cache.residency.decode_group(layer, experts, position, &cache.hits);

  std::vector<ReadyExpert> batch;
  std::vector<size_t> outstanding(experts.size());
  for (size_t i = 0; i < outstanding.size(); ++i) outstanding[i] = i;
  for (bool first = true; !outstanding.empty(); first = false) {
    std::vector<IoQueue::JobPtr> jobs;
    std::vector<size_t> later;
    batch.clear();
    for (size_t i : outstanding) {
      ExpertKey key{layer, experts[i]};
      // A miss that arrived at once still waits for the second batch: the first is the hits that need no waiting.
      if ((first && !cache.hits[i]) || !cache.ready(key)) {
        later.push_back(i);
        if (cache.place(key).load) jobs.push_back(cache.place(key).load->job);
        continue;
      }
      cache.settle(key, Phase::kDecode);
      batch.push_back(ReadyExpert{static_cast<int32_t>(i), cache.view(key)});
    }
    if (!batch.empty()) {
      compute(batch);
    } else if (!first) {
      StallTimer stall(&cache.of(Phase::kDecode).stall_ns);
      cache.queue.wait_any(jobs);
    }
    outstanding = std::move(later);
  }
}

void ExpertCache::drain() {
  impl_->queue.wait_idle();
  impl_->settle_all(Phase::kPrefill);
}

void ExpertCache::clear() {
  Impl& cache = *impl_;
  cache.queue.wait_idle();
  if (cache.slabs != nullptr) cache.slabs->quiesce();
  // A read that failed is no matter any more: its expert is forgotten like all others.
  for (const ExpertKey key : cache.residents()) cache.release(key);
  cache.residency.clear();
  if (cache.recorder != nullptr) cache.recorder->begin_sample();
}

void ExpertCache::resize(int32_t slots) {
  Impl& cache = *impl_;
  const PolicyFacts& facts = cache.residency.facts();
  slots = checked_slots(slots, facts.top_k, facts.total());
  // A background read that failed leaves its expert absent: who needs it reads it again, and meets the error then.
  cache.queue.wait_idle();
  if (cache.slabs != nullptr) cache.slabs->quiesce();
  for (const ExpertKey key : cache.residents()) {
    if (!cache.place(key).load || !cache.queue.failed(cache.place(key).load->job)) continue;
    cache.residency.drop(key);
    cache.release(key);
  }
  if (cache.pool && slots > facts.slots) {
    try {
      cache.pool->resize(slots);
    } catch (...) {
      cache.pool->resize(facts.slots);
      throw;
    }
  }
  cache.residency.resize(slots);
  if (!cache.pool) return;
  cache.pool->resize(slots, [&cache](int32_t from, int32_t to) {
    std::find_if(cache.places.begin(), cache.places.end(), [from](const Place& place) {
      return place.slot == from;
    })->slot = to;
  });
}

PhaseMetrics ExpertCache::metrics(Phase phase) const {
  PhaseMetrics metrics = impl_->of(phase);
  const AccessCounts& counts = impl_->residency.counts(phase);
  metrics.hits = counts.hits;
  metrics.misses = counts.misses;
  metrics.bytes_read = impl_->bytes_read[static_cast<size_t>(phase)];
  return metrics;
}

void ExpertCache::reset_metrics() {
  impl_->residency.reset_counts();
  impl_->phase_metrics = {};
  for (auto& bytes : impl_->bytes_read) bytes = 0;
}

std::vector<AccessEvent> ExpertCache::take_events() { return impl_->residency.take_events(); }

void ExpertCache::residents(std::span<uint8_t> out) const {
  for (size_t id = 0; id < out.size(); ++id)
    out[id] = impl_->residency.resident(impl_->residency.facts().key_of(static_cast<int32_t>(id))) ? 1 : 0;
}

std::vector<int32_t> ExpertCache::residents(int32_t layer) const {
  std::vector<int32_t> out;
  for (const ExpertKey key : impl_->residents()) {
    if (key.layer == layer) out.push_back(key.expert);
  }
  return out;
}

int32_t ExpertCache::slots() const { return impl_->residency.facts().slots; }

uint64_t ExpertCache::pool_bytes() const { return impl_->pool ? impl_->pool->bytes() : 0; }

}  // namespace cfmoe
