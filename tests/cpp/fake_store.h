// An expert store in memory whose reads can be slow, fail and be counted.
#pragma once

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "error.h"
#include "store/aligned_buffer.h"
#include "store/expert_store.h"

namespace cfmoe::test {

inline constexpr int32_t kManyLayers = 3, kManyExperts = 8, kTopK = 2;
inline constexpr uint64_t kBytes = 16384;

class FakeStore final : public ExpertStore {
 public:
  explicit FakeStore(IoMode mode = IoMode::kDirect) : mode_(mode) {
    index_.format = "q4";
    index_.layers = kManyLayers;
    index_.experts = kManyExperts;
    index_.record_bytes = index_.record_stride = kBytes;
    index_.digests.resize(kManyLayers * kManyExperts);
    if (mode == IoMode::kMmap) mapping_ = AlignedBuffer(kBytes * kManyLayers * kManyExperts);
  }

  IoMode mode() const override { return mode_; }
  const ExpertIndex& index() const override { return index_; }
  std::string warning() const override { return ""; }

  uint64_t read(ExpertKey key, void* destination) override {
    begin_read(key);
    std::memset(destination, id_of(key), kBytes);
    return kBytes + 7;  // what the system read may differ from the record's size
  }
  void* map(ExpertKey key) override {
    if (mode_ != IoMode::kMmap) return nullptr;
    begin_read(key);
    std::byte* address = mapping_.data() + static_cast<size_t>(id_of(key)) * kBytes;
    std::memset(address, id_of(key), kBytes);
    std::lock_guard lock(mutex_);
    mapped_.insert(id_of(key));
    return address;
  }
  void unmap(ExpertKey key) override {
    std::lock_guard lock(mutex_);
    mapped_.erase(id_of(key));
  }

  static int id_of(ExpertKey key) { return key.layer * kManyExperts + key.expert; }
  int reads_of(ExpertKey key) {
    std::lock_guard lock(mutex_);
    return reads_[id_of(key)];
  }
  int total_reads() {
    std::lock_guard lock(mutex_);
    int total = 0;
    for (const auto& [id, count] : reads_) total += count;
    return total;
  }
  size_t mapped() {
    std::lock_guard lock(mutex_);
    return mapped_.size();
  }

  std::atomic<int> max_sleep_us = 0;
  std::atomic<int> failing = -1;  // the id of the expert that cannot be read
  std::atomic<uint64_t> seed = 0;

 private:
  void begin_read(ExpertKey key) {
    int sleep_us = 0;
    {
      std::lock_guard lock(mutex_);
      ++reads_[id_of(key)];
      if (max_sleep_us > 0)
        sleep_us = static_cast<int>(std::minstd_rand(static_cast<uint32_t>(++seed * 7919))() %
                                    static_cast<uint32_t>(max_sleep_us));
    }
    if (sleep_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(sleep_us));
    if (id_of(key) == failing) throw Error("experts.bin: expert " + std::to_string(key.expert) + " is damaged");
  }

  IoMode mode_;
  ExpertIndex index_;
  AlignedBuffer mapping_;
  std::mutex mutex_;
  std::map<int, int> reads_;
  std::set<int> mapped_;
};

}  // namespace cfmoe::test
