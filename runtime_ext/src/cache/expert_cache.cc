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
  std::atomic<Phase> phase{Phase::kPrefill};
  std::atomic<bool> ahead{false};  // nobody has asked for it
};

// Where a resident expert is.
struct Place {
  int32_t slot = -1;
  void* mapped = nullptr;
  std::shared_ptr<Load> load;  // not null until someone has seen it done
  bool put_off = false;        // a read ahead that is out of the queue for a while
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

  void load(ExpertKey key, Phase phase) override { start(key, phase, false); }
  void load_ahead(ExpertKey key) override { start(key, Phase::kPrefill, true); }
  void evict(ExpertKey key, Phase phase) override;

  Place& place(ExpertKey key) { return places[static_cast<size_t>(residency.facts().id_of(key))]; }
  PhaseMetrics& of(Phase phase) { return phase_metrics[static_cast<size_t>(phase)]; }
  void start(ExpertKey key, Phase phase, bool ahead);
  void read(ExpertKey key, Phase phase, bool ahead);
  void want(ExpertKey key, Phase phase);
  void put_off_ahead();
  void resume_ahead();
  void drop_failed();
  bool ready(ExpertKey key);
  void settle(ExpertKey key, Phase phase);
  void settle_all(Phase phase);
  void release(ExpertKey key);
  ExpertView view(ExpertKey key);
  std::vector<ExpertKey> residents() const;
  bool waits(const Place& place) const {
    return place.put_off || (place.load != nullptr && queue.waits(place.load->job));
  }

  ExpertStore& store;
  TraceRecorder* const recorder;
  SlabSource* const slabs;
  std::vector<Place> places;  // [layers * experts]
  Residency residency;
  std::unique_ptr<ExpertPool> pool;  // null with mmap in the host's memory
  std::array<PhaseMetrics, 2> phase_metrics;
  std::array<std::atomic<uint64_t>, 2> bytes_read{};  // by I/O threads, as is prefetched
  std::atomic<uint64_t> prefetched{0};
  bool warm = false;
  std::vector<ExpertKey> ahead;  // what fills free slots, the likeliest first
  // A conversation's positions begin at 0 and may go back; those that policies see only rise.
  uint64_t conversation_begin = 0, next_position = 0;
  std::vector<uint64_t> positions;  // of the layer under way
  std::vector<bool> hits;           // of the group under way
  IoQueue queue;                    // last: its threads stop before what they write to goes away
};

void ExpertCache::Impl::start(ExpertKey key, Phase phase, bool ahead) {
  if (pool) {
    place(key).slot = pool->acquire();
    if (place(key).slot < 0) throw Error(ErrorKind::kInternal, "expert cache: the pool has no free slot");
  }
  read(key, phase, ahead);
}

void ExpertCache::Impl::read(ExpertKey key, Phase phase, bool ahead) {
  auto load = std::make_shared<Load>();
  load->phase = phase;
  load->ahead = ahead;
  // A plain pointer: the job must not keep the load alive that holds it, and `settle` keeps the load until the job is
  // done.
  Load* target = load.get();
  std::function<uint64_t()> work;
  if (!pool) {
    work = [this, key, target] {
      target->mapped = store.map(key);
      return store.index().record_bytes;
    };
  } else if (const ExpertView where = view(key); slabs != nullptr) {
    work = [this, key, where] {
      uint64_t bytes = 0;
      slabs->fill(*where.slab, static_cast<uint64_t>(where.word_offset) * 4, store.index().record_bytes,
                  [&](void* destination) { bytes = store.read(key, destination); });
      return bytes;
    };
  } else {
    void* destination = static_cast<int32_t*>(where.base) + where.word_offset;
    work = [this, key, destination] { return store.read(key, destination); };
  }
  const auto counted = [this, target, work = std::move(work)] {
    const bool unasked = target->ahead;
    bytes_read[static_cast<size_t>(target->phase.load())] += work();
    if (unasked) ++prefetched;
  };
  load->job = ahead ? queue.submit_ahead(counted) : queue.submit(counted);
  place(key).load = std::move(load);
}

// A read ahead has its turn now.
void ExpertCache::Impl::want(ExpertKey key, Phase phase) {
  const std::shared_ptr<Load>& load = place(key).load;
  if (!load || !load->ahead || !queue.waits(load->job)) return;
  load->phase = phase;
  load->ahead = false;
  queue.demand(load->job);
}

// Reads ahead that have not begun leave the queue; their experts stay resident. Before anything else looks at them,
// resume_ahead puts them back, with the places that their slots have then.
void ExpertCache::Impl::put_off_ahead() {
  for (const ExpertKey key : ahead) {
    Place& each = place(key);
    if (!each.load || !queue.withdraw(each.load->job)) continue;
    each.load.reset();
    each.put_off = true;
  }
}

void ExpertCache::Impl::resume_ahead() {
  for (const ExpertKey key : ahead) {
    if (std::exchange(place(key).put_off, false)) read(key, Phase::kPrefill, true);
  }
}

// A read that failed before anybody met its error leaves its expert absent: who needs it reads it again, and meets the
// error then.
void ExpertCache::Impl::drop_failed() {
  for (const ExpertKey key : residents()) {
    if (!place(key).load || !queue.failed(place(key).load->job)) continue;
    residency.drop(key);
    release(key);
  }
}

// The slot is not free to be written before the read into it has ended, and the device has no more use of it.
void ExpertCache::Impl::evict(ExpertKey key, Phase phase) {
  try {
    if (const std::shared_ptr<Load> load = place(key).load; load && !queue.withdraw(load->job)) {
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
  want(key, phase);
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
  Impl& cache = *impl_;
  if (cache.recorder != nullptr) cache.recorder->note(phase, layer, ids, scores, first_position);
  first_position += cache.conversation_begin;
  cache.residency.note_routing(phase, layer, ids, scores, first_position);
  const auto top_k = static_cast<size_t>(cache.residency.facts().top_k);
  cache.next_position = std::max(cache.next_position, first_position + ids.size() / top_k);
}

bool ExpertCache::wants_scores() const {
  return impl_->residency.wants_scores() || (impl_->recorder != nullptr && impl_->recorder->wants_scores());
}

void ExpertCache::prefill_layer(int32_t layer, std::span<const int32_t> experts,
                                std::span<const uint64_t> last_positions, const ComputeFn& compute) {
  Impl& cache = *impl_;
  cache.positions.assign(last_positions.begin(), last_positions.end());
  for (uint64_t& position : cache.positions) position += cache.conversation_begin;
  Residency::PrefillPass pass(cache.residency, layer, experts, cache.positions);
  for (size_t n = 0; n < pass.issued(); ++n) cache.want(pass.key(n), Phase::kPrefill);
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
  cache.residency.decode_group(layer, experts, position + cache.conversation_begin, &cache.hits);
  for (const int32_t expert : experts) cache.want(ExpertKey{layer, expert}, Phase::kDecode);

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

void ExpertCache::keep_warm(std::vector<ExpertKey> experts) {
  Impl& cache = *impl_;
  cache.put_off_ahead();
  for (const ExpertKey key : cache.ahead) {
    if (!cache.place(key).put_off) continue;
    cache.residency.drop(key);
    cache.release(key);
  }
  cache.warm = true;
  cache.ahead = std::move(experts);
  cache.residency.fill(cache.ahead, cache.next_position);
}

void ExpertCache::hold_ahead(bool held) { impl_->queue.hold_ahead(held); }

void ExpertCache::begin_conversation() {
  Impl& cache = *impl_;
  if (cache.warm) return rewind(0);
  drain();
  clear();
  cache.conversation_begin = cache.next_position = 0;
}

void ExpertCache::rewind(uint64_t position) {
  Impl& cache = *impl_;
  cache.drop_failed();
  cache.residency.forget_routing();
  const uint64_t begin = cache.next_position - position;
  cache.residency.shift_events(begin - cache.conversation_begin);
  cache.conversation_begin = begin;
  if (cache.recorder != nullptr) cache.recorder->begin_sample();
}

void ExpertCache::drain() {
  impl_->queue.wait_idle();
  impl_->settle_all(Phase::kPrefill);
}

void ExpertCache::clear() {
  Impl& cache = *impl_;
  cache.put_off_ahead();
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
  struct PutOff {
    explicit PutOff(Impl& the_cache) : cache(the_cache) { cache.put_off_ahead(); }
    ~PutOff() { cache.resume_ahead(); }
    Impl& cache;
  };
  {
    const PutOff while_slots_change(cache);
    cache.queue.wait_idle();
    if (cache.slabs != nullptr) cache.slabs->quiesce();
    cache.drop_failed();
    if (cache.pool && slots > facts.slots) {
      try {
        cache.pool->resize(slots);
      } catch (...) {
        cache.pool->resize(facts.slots);
        throw;
      }
    }
    cache.residency.resize(slots);
    if (cache.pool) {
      cache.pool->resize(slots, [&cache](int32_t from, int32_t to) {
        std::find_if(cache.places.begin(), cache.places.end(), [from](const Place& place) {
          return place.slot == from;
        })->slot = to;
      });
    }
  }
  cache.residency.fill(cache.ahead, cache.next_position);
}

PhaseMetrics ExpertCache::metrics(Phase phase) const {
  PhaseMetrics metrics = impl_->of(phase);
  const AccessCounts& counts = impl_->residency.counts(phase);
  metrics.hits = counts.hits;
  metrics.misses = counts.misses;
  metrics.bytes_read = impl_->bytes_read[static_cast<size_t>(phase)];
  if (phase == Phase::kPrefill) metrics.prefetched = impl_->prefetched;
  return metrics;
}

void ExpertCache::reset_metrics() {
  impl_->residency.reset_counts();
  impl_->phase_metrics = {};
  for (auto& bytes : impl_->bytes_read) bytes = 0;
  impl_->prefetched = 0;
}

std::vector<AccessEvent> ExpertCache::take_events() {
  std::vector<AccessEvent> events = impl_->residency.take_events();
  for (AccessEvent& event : events) event.position -= impl_->conversation_begin;
  return events;
}

void ExpertCache::residents(std::span<uint8_t> out) const {
  for (size_t id = 0; id < out.size(); ++id) {
    const bool resident = impl_->residency.resident(impl_->residency.facts().key_of(static_cast<int32_t>(id)));
    out[id] = resident && !impl_->waits(impl_->places[id]) ? 1 : 0;
  }
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
