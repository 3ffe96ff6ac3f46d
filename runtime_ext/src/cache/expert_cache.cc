// Keeps a policy-managed set of experts in memory and streams the others through it.
//
// An expert is resident from the moment when its load is issued: the policy's state depends on the order of the calls
// only. Whoever needs the record waits for the load (`settle`); a load that failed makes its expert absent again and
// its slot free.
#include "cache/expert_cache.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <utility>

#include "cache/expert_pool.h"
#include "cache/hand_over.h"
#include "cache/io_queue.h"
#include "error.h"

namespace cfmoe {
namespace {

// While loads wait for room, residents are computed in small batches: each batch that is done makes room, so reading
// goes on beside compute.
constexpr size_t kBatchWhileBlocked = 4;

struct Load {
  IoQueue::JobPtr job;
  void* mapped = nullptr;  // mmap: written by the job
};

struct Entry {
  bool resident = false;
  bool pinned = false;
  int32_t slot = -1;
  void* mapped = nullptr;
  std::shared_ptr<Load> load;  // not null until someone has seen it done
};

}  // namespace

struct ExpertCache::Impl {
  Impl(ExpertStore& the_store, int32_t the_top_k, const ExpertCacheOptions& options);

  Entry& entry(ExpertKey key) { return entries[static_cast<size_t>(key.layer * experts + key.expert)]; }
  void check_group(int32_t layer, std::span<const int32_t> ids) const;

  bool make_room(Phase phase);
  void start_load(ExpertKey key, uint64_t position, Phase phase);
  void submit_read(ExpertKey key, Phase phase);
  bool ready(ExpertKey key);
  void settle(ExpertKey key, Phase phase);
  void settle_all(Phase phase);
  void forget(ExpertKey key);
  ExpertView view(ExpertKey key);
  void count(Phase phase, bool hit, ExpertKey key, uint64_t position);
  PhaseMetrics& of(Phase phase) { return phase_metrics[static_cast<size_t>(phase)]; }

  ExpertStore& store;
  const int32_t layers, experts, top_k;
  const bool mapped_in_place;
  const bool log_events;
  int32_t slots = 0;
  int32_t resident_count = 0;
  std::vector<Entry> entries;  // [layers * experts]
  std::unique_ptr<CachePolicy> policy;
  std::unique_ptr<ExpertPool> pool;  // null with mmap
  PrefillRouting routing;
  std::array<PhaseMetrics, 2> phase_metrics;
  std::array<std::atomic<uint64_t>, 2> bytes_read{};  // by I/O threads
  std::vector<AccessEvent> events;
  std::function<bool(ExpertKey)> is_pinned;
  IoQueue queue;  // last: its threads stop before what they write to goes away
};

namespace {

// Pins the experts of one call, and unpins what is still pinned however the call ends.
class PinScope {
 public:
  ~PinScope() {
    for (Entry* entry : pinned_) entry->pinned = false;
  }
  void pin(Entry& entry) {
    entry.pinned = true;
    pinned_.push_back(&entry);
  }

 private:
  std::vector<Entry*> pinned_;
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

}  // namespace

ExpertCache::Impl::Impl(ExpertStore& the_store, int32_t the_top_k, const ExpertCacheOptions& options)
    : store(the_store),
      layers(the_store.index().layers),
      experts(the_store.index().experts),
      top_k(the_top_k),
      mapped_in_place(the_store.mode() == IoMode::kMmap),
      log_events(options.log_events),
      slots(checked_slots(options.slots, the_top_k, layers * experts)),
      entries(static_cast<size_t>(layers) * static_cast<size_t>(experts)),
      policy(make_policy(options.policy, layers, experts)),
      routing(layers, experts),
      is_pinned([this](ExpertKey key) { return entry(key).pinned; }),
      queue(options.io_threads) {
  if (!mapped_in_place) pool = std::make_unique<ExpertPool>(store.index().record_stride, slots);
}

void ExpertCache::Impl::check_group(int32_t layer, std::span<const int32_t> ids) const {
  if (layer < 0 || layer >= layers)
    throw Error(ErrorKind::kInternal, "expert cache: no MoE layer " + std::to_string(layer));
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= experts)
      throw Error(ErrorKind::kInternal, "expert cache: no expert " + std::to_string(ids[i]));
  }
}

// True once a slot is free; gives up the policy's victim if it must. False if every resident is pinned.
bool ExpertCache::Impl::make_room(Phase phase) {
  if (resident_count < slots) return true;
  ExpertKey key;
  if (!policy->victim(is_pinned, &key)) return false;
  // The slot is not free to be written before the read into it has ended.
  settle(key, phase);
  forget(key);
  return true;
}

void ExpertCache::Impl::start_load(ExpertKey key, uint64_t position, Phase phase) {
  Entry& target = entry(key);
  if (pool) {
    target.slot = pool->acquire();
    if (target.slot < 0) throw Error(ErrorKind::kInternal, "expert cache: the pool has no free slot");
  }
  target.resident = true;
  ++resident_count;
  policy->on_insert(key, position);
  submit_read(key, phase);
}

void ExpertCache::Impl::submit_read(ExpertKey key, Phase phase) {
  auto load = std::make_shared<Load>();
  std::atomic<uint64_t>& bytes = bytes_read[static_cast<size_t>(phase)];
  if (pool) {
    ExpertView where = view(key);
    void* destination = static_cast<int32_t*>(where.base) + where.word_offset;
    load->job = queue.submit([this, key, destination, &bytes] { bytes += store.read(key, destination); });
  } else {
    // A plain pointer: the job must not keep the load alive that holds it, and `settle` keeps the load until the job is
    // done.
    Load* target = load.get();
    load->job = queue.submit([this, key, target, &bytes] {
      target->mapped = store.map(key);
      bytes += store.index().record_bytes;
    });
  }
  entry(key).load = std::move(load);
}

bool ExpertCache::Impl::ready(ExpertKey key) {
  Entry& target = entry(key);
  return !target.load || queue.done(target.load->job);
}

void ExpertCache::Impl::settle(ExpertKey key, Phase phase) {
  Entry& target = entry(key);
  if (!target.load) return;
  try {
    if (!queue.done(target.load->job)) {
      StallTimer stall(&of(phase).stall_ns);
      queue.wait(target.load->job);
    } else {
      queue.wait(target.load->job);
    }
  } catch (...) {
    forget(key);
    throw;
  }
  target.mapped = target.load->mapped;
  target.load.reset();
}

// Settles every expert, so that all failed loads are forgotten; throws the first error.
void ExpertCache::Impl::settle_all(Phase phase) {
  std::exception_ptr first;
  for (int32_t layer = 0; layer < layers; ++layer) {
    for (int32_t expert = 0; expert < experts; ++expert) {
      try {
        settle(ExpertKey{layer, expert}, phase);
      } catch (...) {
        if (!first) first = std::current_exception();
      }
    }
  }
  if (first) std::rethrow_exception(first);
}

// Only for an expert whose read has ended.
void ExpertCache::Impl::forget(ExpertKey key) {
  Entry& target = entry(key);
  policy->on_evict(key);
  if (pool) {
    pool->release(target.slot);
  } else {
    store.unmap(key);
  }
  bool pinned = target.pinned;
  target = Entry{};
  target.pinned = pinned;
  --resident_count;
}

ExpertView ExpertCache::Impl::view(ExpertKey key) {
  Entry& target = entry(key);
  if (pool) return pool->view(target.slot);
  return ExpertView{target.mapped, static_cast<int64_t>(store.index().record_stride / 4), 0};
}

void ExpertCache::Impl::count(Phase phase, bool hit, ExpertKey key, uint64_t position) {
  PhaseMetrics& metrics = of(phase);
  ++(hit ? metrics.hits : metrics.misses);
  if (log_events) events.push_back(AccessEvent{phase, hit, key, position});
}

ExpertCache::ExpertCache(ExpertStore& store, int32_t top_k, const ExpertCacheOptions& options)
    : impl_(std::make_unique<Impl>(store, top_k, options)) {}

ExpertCache::~ExpertCache() = default;

void ExpertCache::prefill_layer(int32_t layer, std::span<const int32_t> experts,
                                std::span<const uint64_t> last_positions, const ComputeFn& compute) {
  Impl& cache = *impl_;
  cache.check_group(layer, experts);
  bool ascending = std::adjacent_find(experts.begin(), experts.end(), std::greater_equal<>()) == experts.end();
  if (experts.size() != last_positions.size() || !ascending) {
    throw Error(ErrorKind::kInternal,
                "expert cache: the experts of a prefill layer are not ascending or lack positions");
  }
  // The order of everything: residents ascending, then the missing ascending.
  std::vector<size_t> order(experts.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  auto key_of = [&](size_t i) { return ExpertKey{layer, experts[i]}; };
  auto first_missing =
      std::stable_partition(order.begin(), order.end(), [&](size_t i) { return cache.entry(key_of(i)).resident; });
  auto hits = static_cast<size_t>(first_missing - order.begin());
  PinScope pins;
  for (size_t n = 0; n < order.size(); ++n) {
    cache.count(Phase::kPrefill, n < hits, key_of(order[n]), last_positions[order[n]]);
    if (n < hits) pins.pin(cache.entry(key_of(order[n])));
  }

  size_t issued = hits;
  auto issue = [&] {
    while (issued < order.size() && cache.make_room(Phase::kPrefill)) {
      size_t i = order[issued++];
      pins.pin(cache.entry(key_of(i)));
      cache.start_load(key_of(i), last_positions[i], Phase::kPrefill);
    }
  };
  issue();
  std::vector<ReadyExpert> batch;
  for (size_t done = 0; done < order.size();) {
    size_t limit = issued < order.size() ? kBatchWhileBlocked : order.size();
    batch.clear();
    for (size_t n = done; n < issued && batch.size() < limit; ++n) {
      ExpertKey key = key_of(order[n]);
      if (n > done && !cache.ready(key)) break;
      cache.settle(key, Phase::kPrefill);
      batch.push_back(ReadyExpert{static_cast<int32_t>(order[n]), cache.view(key)});
    }
    compute(batch);
    // One at a time, whatever the batch was: then the victims do not depend on which loads happened to arrive together.
    for (size_t end = done + batch.size(); done < end; ++done) {
      size_t i = order[done];
      cache.policy->on_access(key_of(i), last_positions[i]);
      cache.entry(key_of(i)).pinned = false;
      issue();
    }
  }
}

void ExpertCache::note_prefill_routing(int32_t layer, std::span<const int32_t> ids, uint64_t first_position) {
  impl_->routing.note(layer, ids, impl_->top_k, first_position);
}

void ExpertCache::hand_over() {
  Impl& cache = *impl_;
  if (cache.routing.empty()) return;
  std::vector<PrefillRouting::Use> chosen = choose_hand_over(cache.routing, cache.slots);
  cache.routing.clear();
  PinScope pins;
  for (const PrefillRouting::Use& use : chosen) pins.pin(cache.entry(use.key));
  // Residents that were not chosen keep what room is left, as the policy ranks them.
  std::vector<PrefillRouting::Use> absent;
  for (const PrefillRouting::Use& use : chosen) {
    if (!cache.entry(use.key).resident) absent.push_back(use);
  }
  while (cache.resident_count + static_cast<int32_t>(absent.size()) > cache.slots) {
    ExpertKey key;
    if (!cache.policy->victim(cache.is_pinned, &key))
      throw Error(ErrorKind::kInternal, "hand-over: every resident is pinned");
    cache.settle(key, Phase::kPrefill);
    cache.forget(key);
  }
  // The reads start with the likeliest experts, so that decode seldom waits; the policy is told of all in the order of
  // their last use.
  std::stable_sort(absent.begin(), absent.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  for (const PrefillRouting::Use& use : absent) cache.start_load(use.key, use.last_position, Phase::kPrefill);
  for (const PrefillRouting::Use& use : chosen) cache.policy->on_access(use.key, use.last_position);
}

void ExpertCache::decode_group(int32_t layer, std::span<const int32_t> experts, uint64_t position,
                               const ComputeFn& compute) {
  Impl& cache = *impl_;
  cache.check_group(layer, experts);
  if (experts.size() > static_cast<size_t>(cache.slots)) {
    throw Error(ErrorKind::kInternal,
                "expert cache: a group of " + std::to_string(experts.size()) + " experts does not fit");
  }
  PinScope pins;
  std::vector<bool> hit(experts.size());
  for (size_t i = 0; i < experts.size(); ++i) {
    Entry& entry = cache.entry(ExpertKey{layer, experts[i]});
    if (entry.pinned)
      throw Error(ErrorKind::kInternal, "expert cache: expert " + std::to_string(experts[i]) + " twice in a group");
    hit[i] = entry.resident;
    pins.pin(entry);
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    ExpertKey key{layer, experts[i]};
    cache.count(Phase::kDecode, hit[i], key, position);
    if (!hit[i]) {
      if (!cache.make_room(Phase::kDecode)) throw Error(ErrorKind::kInternal, "expert cache: every resident is pinned");
      cache.start_load(key, position, Phase::kDecode);
    }
    cache.policy->on_access(key, position);
  }

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
      if ((first && !hit[i]) || !cache.ready(key)) {
        later.push_back(i);
        if (cache.entry(key).load) jobs.push_back(cache.entry(key).load->job);
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
  for (int32_t layer = 0; layer < cache.layers; ++layer) {
    for (int32_t expert = 0; expert < cache.experts; ++expert) {
      // A read that failed is no matter any more: its expert is forgotten like all others.
      if (cache.entry(ExpertKey{layer, expert}).resident) cache.forget(ExpertKey{layer, expert});
    }
  }
  cache.policy->clear();
  cache.routing.clear();
}

void ExpertCache::resize(int32_t slots) {
  Impl& cache = *impl_;
  slots = checked_slots(slots, cache.top_k, cache.layers * cache.experts);
  drain();
  while (cache.resident_count > slots) {
    ExpertKey key;
    if (!cache.policy->victim(cache.is_pinned, &key))
      throw Error(ErrorKind::kInternal, "expert cache: every resident is pinned");
    cache.forget(key);
  }
  if (cache.pool) cache.pool->resize(slots);
  cache.slots = slots;
}

const PhaseMetrics& ExpertCache::metrics(Phase phase) const {
  PhaseMetrics& metrics = impl_->of(phase);
  metrics.bytes_read = impl_->bytes_read[static_cast<size_t>(phase)];
  return metrics;
}

void ExpertCache::reset_metrics() {
  impl_->phase_metrics = {};
  for (auto& bytes : impl_->bytes_read) bytes = 0;
}

std::vector<AccessEvent> ExpertCache::take_events() { return std::exchange(impl_->events, {}); }

std::vector<int32_t> ExpertCache::residents(int32_t layer) const {
  impl_->check_group(layer, {});
  std::vector<int32_t> out;
  for (int32_t expert = 0; expert < impl_->experts; ++expert) {
    if (impl_->entry(ExpertKey{layer, expert}).resident) out.push_back(expert);
  }
  return out;
}

int32_t ExpertCache::slots() const { return impl_->slots; }

uint64_t ExpertCache::pool_bytes() const { return impl_->pool ? impl_->pool->bytes() : 0; }

}  // namespace cfmoe
