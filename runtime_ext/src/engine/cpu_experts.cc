// Waves of experts on the thread pool.
#include "engine/cpu_experts.h"

#include <algorithm>
#include <array>

#include "engine/dl_tensor.h"
#include "error.h"

namespace cfmoe {
namespace {

// A tile's weights are unpacked once for all of its rows; that costs about as much as these.
constexpr int64_t kRowsPerUnpacking = 2;
// Weights that a wave must touch before it is worth a parallel region. A thread that the system has taken off its CPU
// holds the others up for milliseconds; a quarter of a mebibyte is done alone in some ten microseconds. Measured: 108
// KiB are better done alone, 486 KiB by two threads (docs/performance.md).
constexpr uint64_t kParallelBytes = 256 * 1024;

}  // namespace

CpuExperts::CpuExperts(const CpuExpertsFacts& facts, const ExpertKernelSet& kernels, ThreadPool& pool,
                       const ExpertLists& lists)
    : facts_(facts), kernels_(kernels), pool_(pool), lists_(lists), wave_(static_cast<size_t>(facts.experts)) {
  const auto slabs = static_cast<int32_t>(facts_.slab_dtypes.size());
  if (slabs > kMaxSlabs) throw Error(ErrorKind::kInternal, "the plan has more slab dtypes than an expert kernel takes");
  argument_count_ = 6 + slabs;
}

void CpuExperts::add(const ExpertShare& share) {
  Work& work = wave_[wave_size_++];
  work.cost = share.count + kRowsPerUnpacking;
  work.cost_end = work.cost + (wave_size_ > 1 ? wave_[wave_size_ - 2].cost_end : 0);
  const DLDataType int32 = to_dl_dtype(DType::kInt32);
  work.rows_extent = share.count;
  work.rows_in = make_tensor(lists_.rows_in.data() + share.list, int32, 1, &work.rows_extent);
  work.rows_out = make_tensor(lists_.rows_out.data() + share.list, int32, 1, &work.rows_extent);
  const int64_t width = scratch_->shape[1];
  work.scratch_shape[0] = share.count;
  work.scratch_shape[1] = width;
  char* scratch = static_cast<char*>(scratch_->data) + share.scratch_row * width * (scratch_->dtype.bits / 8);
  work.scratch = make_tensor(scratch, scratch_->dtype, 2, work.scratch_shape);

  int32_t i = 0;
  work.gate_up[0] = tensor_argument(activation_);
  work.down[0] = tensor_argument(&work.scratch);
  work.gate_up[1] = tensor_argument(&work.rows_in);
  work.down[1] = tensor_argument(&work.rows_out);
  for (; i < static_cast<int32_t>(facts_.slab_dtypes.size()); ++i) {
    const DType dtype = facts_.slab_dtypes[i];
    work.slab_extents[i] = share.view.extent_words * 4 / dtype_bytes(dtype);
    work.slabs[i] = make_tensor(share.view.base, to_dl_dtype(dtype), 1, &work.slab_extents[i]);
    work.gate_up[2 + i] = work.down[2 + i] = tensor_argument(&work.slabs[i]);
  }
  work.gate_up[2 + i] = tensor_argument(&work.scratch);
  work.down[2 + i] = tensor_argument(rows_);
  work.gate_up[3 + i] = work.down[3 + i] = integer_argument(share.view.word_offset);
  for (int32_t bound : {4 + i, 5 + i}) work.gate_up[bound] = work.down[bound] = integer_argument(0);
}

int CpuExperts::run_tiles(const Kernel& kernel, bool down, int32_t tiles, int32_t thread, int32_t threads) const {
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

void CpuExperts::run(std::span<const ExpertShare> wave, bool) {
  if (wave.empty()) return;
  wave_size_ = 0;
  for (const ExpertShare& share : wave) add(share);
  const auto passes = static_cast<uint64_t>(wave_[wave_size_ - 1].cost_end) / (1 + kRowsPerUnpacking);
  const int32_t threads = passes * facts_.record_bytes < kParallelBytes ? 1 : pool_.size();
  auto gate_up = [&](int32_t t) { return run_tiles(kernels_.gate_up, false, facts_.gate_up_tiles, t, threads); };
  auto down = [&](int32_t t) { return run_tiles(kernels_.down, true, facts_.down_tiles, t, threads); };
  pool_.run(threads, gate_up);
  pool_.run(threads, down);
}

}  // namespace cfmoe
