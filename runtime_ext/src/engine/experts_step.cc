// Experts in waves: the tiles of all experts that are ready are shared out among the threads.
#include "engine/experts_step.h"

#include <algorithm>
#include <array>
#include <string>

#include "engine/dl_tensor.h"
#include "error.h"

namespace cfmoe {
namespace {

constexpr int32_t kAlignedInts = 16;  // 64 bytes
// A tile's weights are unpacked once for all of its rows; that costs about as much as these.
constexpr int64_t kRowsPerUnpacking = 2;
// Weights that a wave must touch before it is worth a parallel region. A thread that the system has taken off its CPU
// holds the others up for milliseconds; a quarter of a mebibyte is done alone in some ten microseconds.
constexpr uint64_t kParallelBytes = 256 * 1024;

int64_t aligned_ints(int64_t count) { return (count + kAlignedInts - 1) / kAlignedInts * kAlignedInts; }

int64_t prefill_list_ints(int32_t experts, int32_t top_k, int32_t chunk) {
  return aligned_ints(int64_t{chunk} * top_k) + int64_t{kAlignedInts} * experts;
}

}  // namespace

uint64_t ExpertsStep::list_bytes(int32_t experts, int32_t top_k, int32_t chunk) {
  return sizeof(int32_t) *
         static_cast<uint64_t>(2 * prefill_list_ints(experts, top_k, chunk) + int64_t{kAlignedInts} * (top_k + 1));
}

ExpertsStep::ExpertsStep(const ExpertsStepFacts& facts, ExpertCache& cache, ThreadPool& pool, std::span<int32_t> lists)
    : facts_(facts), cache_(cache), pool_(pool), lists_(lists), wave_(static_cast<size_t>(facts.experts)) {
  const auto slabs = static_cast<int32_t>(facts_.slab_dtypes.size());
  if (slabs > kMaxSlabs) throw Error(ErrorKind::kInternal, "the plan has more slab dtypes than an expert kernel takes");
  argument_count_ = 6 + slabs;
  groups_.resize(static_cast<size_t>(facts.experts));
  chosen_.reserve(static_cast<size_t>(facts.experts));
  last_positions_.reserve(static_cast<size_t>(facts.experts));
  int32_t* decode_lists = lists_.data() + 2 * prefill_list_ints(facts.experts, facts.top_k, facts.chunk);
  decode_lists[0] = 0;
  for (int32_t k = 0; k < facts.top_k; ++k) decode_lists[(k + 1) * kAlignedInts] = k;
}

// A plan may name a buffer that no router has written.
void ExpertsStep::check_ids(std::span<const int32_t> ids) const {
  for (const int32_t id : ids) {
    if (id < 0 || id >= facts_.experts)
      throw Error("plan.json: a step computes experts that were not routed; compile the artifact again");
  }
}

void ExpertsStep::group(const int32_t* ids, int64_t n, uint64_t first_position) {
  const int32_t top_k = facts_.top_k;
  const int64_t count = n * top_k;
  for (Group& g : groups_) g = {};
  check_ids({ids, static_cast<size_t>(count)});
  for (int64_t i = 0; i < count; ++i) ++groups_[ids[i]].count;
  chosen_.clear();
  last_positions_.clear();
  int32_t begin = 0;
  for (int32_t e = 0; e < facts_.experts; ++e) {
    Group& g = groups_[e];
    if (g.count == 0) continue;
    g.begin = begin;
    begin += static_cast<int32_t>(aligned_ints(g.count));
    g.count = 0;  // counts again while the lists fill
    chosen_.push_back(e);
  }
  int32_t* rows_in = lists_.data();
  int32_t* rows_out = rows_in + prefill_list_ints(facts_.experts, top_k, facts_.chunk);
  for (int64_t i = 0; i < count; ++i) {
    Group& g = groups_[ids[i]];
    rows_in[g.begin + g.count] = static_cast<int32_t>(i / top_k);
    rows_out[g.begin + g.count] = static_cast<int32_t>(i);
    ++g.count;
  }
  for (int32_t e : chosen_) {
    const Group& g = groups_[e];
    last_positions_.push_back(first_position + static_cast<uint64_t>(rows_in[g.begin + g.count - 1]));
  }
}

void ExpertsStep::add(const ReadyExpert& ready, int32_t* rows_in, int32_t* rows_out, int64_t count, int64_t scratch_row,
                      const ExpertsTensors& tensors) {
  Work& work = wave_[wave_size_++];
  work.cost = count + kRowsPerUnpacking;
  work.cost_end = work.cost + (wave_size_ > 1 ? wave_[wave_size_ - 2].cost_end : 0);
  const DLDataType int32 = to_dl_dtype(DType::kInt32);
  work.rows_extent = count;
  work.rows_in = make_tensor(rows_in, int32, 1, &work.rows_extent);
  work.rows_out = make_tensor(rows_out, int32, 1, &work.rows_extent);
  const int64_t width = tensors.scratch->shape[1];
  work.scratch_shape[0] = count;
  work.scratch_shape[1] = width;
  char* scratch = static_cast<char*>(tensors.scratch->data) + scratch_row * width * (tensors.scratch->dtype.bits / 8);
  work.scratch = make_tensor(scratch, tensors.scratch->dtype, 2, work.scratch_shape);

  int32_t i = 0;
  work.gate_up[0] = tensor_argument(tensors.activation);
  work.down[0] = tensor_argument(&work.scratch);
  work.gate_up[1] = tensor_argument(&work.rows_in);
  work.down[1] = tensor_argument(&work.rows_out);
  for (; i < static_cast<int32_t>(facts_.slab_dtypes.size()); ++i) {
    const DType dtype = facts_.slab_dtypes[i];
    work.slab_extents[i] = ready.view.extent_words * 4 / dtype_bytes(dtype);
    work.slabs[i] = make_tensor(ready.view.base, to_dl_dtype(dtype), 1, &work.slab_extents[i]);
    work.gate_up[2 + i] = work.down[2 + i] = tensor_argument(&work.slabs[i]);
  }
  work.gate_up[2 + i] = tensor_argument(&work.scratch);
  work.down[2 + i] = tensor_argument(tensors.rows);
  work.gate_up[3 + i] = work.down[3 + i] = integer_argument(ready.view.word_offset);
  for (int32_t bound : {4 + i, 5 + i}) work.gate_up[bound] = work.down[bound] = integer_argument(0);
}

int ExpertsStep::run_tiles(const Kernel& kernel, bool down, int32_t tiles, int32_t thread, int32_t threads) const {
  const int64_t total = wave_[wave_size_ - 1].cost_end * tiles;
  const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
  for (int32_t i = 0; i < wave_size_; ++i) {
    const Work& work = wave_[i];
    const int64_t start = (work.cost_end - work.cost) * tiles;
    const int64_t begin = std::clamp<int64_t>((from - start) / work.cost, 0, tiles);
    const int64_t end = std::clamp<int64_t>((to - start) / work.cost, 0, tiles);
    if (begin < end) {
      std::array<TVMFFIAny, kMaxArguments> arguments;
      std::copy_n(down ? work.down : work.gate_up, argument_count_, arguments.begin());
      arguments[argument_count_ - 2].v_int64 = begin;
      arguments[argument_count_ - 1].v_int64 = end;
      kernel(arguments.data(), argument_count_);
    }
  }
  return 0;
}

void ExpertsStep::flush(const ExpertKernelSet& kernels) {
  if (wave_size_ == 0) return;
  const auto passes = static_cast<uint64_t>(wave_[wave_size_ - 1].cost_end) / (1 + kRowsPerUnpacking);
  const int32_t threads = passes * facts_.record_bytes < kParallelBytes ? 1 : pool_.size();
  auto gate_up = [&](int32_t t) { return run_tiles(kernels.gate_up, false, facts_.gate_up_tiles, t, threads); };
  auto down = [&](int32_t t) { return run_tiles(kernels.down, true, facts_.down_tiles, t, threads); };
  pool_.run(threads, gate_up);
  pool_.run(threads, down);
  wave_size_ = 0;
}

void ExpertsStep::prefill(int32_t layer, const ExpertsTensors& tensors, int64_t n, uint64_t first_position,
                          const std::atomic<bool>& cancelled) {
  if (cancelled.load(std::memory_order_relaxed)) throw Error(ErrorKind::kCancelled, "cancelled");
  wave_size_ = 0;
  group(tensors.ids, n, first_position);
  cache_.note_routing(Phase::kPrefill, layer, {tensors.ids, static_cast<size_t>(n * facts_.top_k)}, tensors.scores,
                      first_position);
  int32_t* rows_in = lists_.data();
  int32_t* rows_out = rows_in + prefill_list_ints(facts_.experts, facts_.top_k, facts_.chunk);
  const int64_t capacity = tensors.scratch->shape[0];
  cache_.prefill_layer(layer, chosen_, last_positions_, [&](std::span<const ReadyExpert> ready) {
    int64_t used = 0;
    for (const ReadyExpert& expert : ready) {
      const Group& g = groups_[chosen_[expert.index]];
      if (used + g.count > capacity) {
        flush(facts_.prefill);
        used = 0;
      }
      add(expert, rows_in + g.begin, rows_out + g.begin, g.count, used, tensors);
      used += g.count;
    }
    flush(facts_.prefill);
  });
}

void ExpertsStep::decode(int32_t layer, const ExpertsTensors& tensors, uint64_t position) {
  wave_size_ = 0;
  int32_t* lists = lists_.data() + 2 * prefill_list_ints(facts_.experts, facts_.top_k, facts_.chunk);
  const std::span<const int32_t> chosen(tensors.ids, static_cast<size_t>(facts_.top_k));
  check_ids(chosen);
  cache_.note_routing(Phase::kDecode, layer, chosen, tensors.scores, position);
  cache_.decode_group(layer, chosen, position, [&](std::span<const ReadyExpert> ready) {
    for (const ReadyExpert& expert : ready) {
      add(expert, lists, lists + (expert.index + 1) * kAlignedInts, 1, expert.index, tensors);
    }
    flush(facts_.decode);
  });
}

}  // namespace cfmoe
