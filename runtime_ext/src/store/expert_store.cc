// Expert records by direct I/O, buffered reads or a memory mapping.
#include "store/expert_store.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "artifact/checksum.h"
#include "error.h"
#include "store/aligned_buffer.h"
#include "store/file_handle.h"

namespace cfmoe {
namespace {

// Which records were verified. Two threads that meet an unverified record at once both verify it, which is harmless.
class VerifiedSet {
 public:
  explicit VerifiedSet(size_t records) : words_((records + 63) / 64) {}
  bool contains(size_t record) const {
    return (words_[record / 64].load(std::memory_order_relaxed) >> (record % 64) & 1) != 0;
  }
  void insert(size_t record) { words_[record / 64].fetch_or(uint64_t{1} << (record % 64), std::memory_order_relaxed); }

 private:
  std::vector<std::atomic<uint64_t>> words_;
};

class StoreBase : public ExpertStore {
 public:
  StoreBase(FileHandle file, ExpertIndex index)
      : file_(std::move(file)), index_(std::move(index)), verified_(index_.digests.size()) {
    uint64_t wanted = index_.digests.size() * index_.record_stride;
    if (file_.size() != wanted) {
      throw Error(file_.path() + ": has " + std::to_string(file_.size()) + " bytes, the index needs " +
                  std::to_string(wanted) + "; copy the artifact again or compile it again with cfmoe compile");
    }
  }
  const ExpertIndex& index() const override { return index_; }

 protected:
  size_t record_of(ExpertKey key) const {
    if (key.layer < 0 || key.layer >= index_.layers || key.expert < 0 || key.expert >= index_.experts) {
      throw Error(ErrorKind::kInternal, "no record for " + name_of(key));
    }
    return static_cast<size_t>(key.layer) * static_cast<size_t>(index_.experts) + static_cast<size_t>(key.expert);
  }

  std::string name_of(ExpertKey key) const {
    return file_.path() + ": expert " + std::to_string(key.expert) + " of MoE layer " + std::to_string(key.layer);
  }

  void verify(ExpertKey key, size_t record, const void* data) {
    if (verified_.contains(record)) return;
    uint64_t digest = xxh3_64(data, index_.record_bytes);
    if (digest != index_.digests[record]) {
      throw Error(name_of(key) + " is damaged: its digest is " + format_digest(digest) + ", the index says " +
                  format_digest(index_.digests[record]) +
                  "; copy the artifact again or compile it again with cfmoe compile");
    }
    verified_.insert(record);
  }

  FileHandle file_;
  ExpertIndex index_;

 private:
  VerifiedSet verified_;
};

class ReadStore final : public StoreBase {
 public:
  ReadStore(FileHandle file, ExpertIndex index, std::string warning)
      : StoreBase(std::move(file), std::move(index)), warning_(std::move(warning)) {}

  IoMode mode() const override { return file_.direct() ? IoMode::kDirect : IoMode::kBuffered; }
  std::string warning() const override { return warning_; }

  uint64_t read(ExpertKey key, void* destination) override {
    size_t record = record_of(key);
    uint64_t size = index_.record_bytes;
    // Whole blocks, but not the whole padding: the stride may be three blocks longer than the record needs.
    if (file_.direct()) size = (size + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    uint64_t got = file_.read_at(record * index_.record_stride, destination, size);
    if (got < size) {
      throw Error(name_of(key) + " is cut short: " + std::to_string(got) + " of " + std::to_string(size) +
                  " bytes; copy the artifact again or compile it again with cfmoe compile");
    }
    verify(key, record, destination);
    return got;
  }

  void* map(ExpertKey) override { return nullptr; }
  void unmap(ExpertKey) override {}

 private:
  std::string warning_;
};

class MmapStore final : public StoreBase {
 public:
  MmapStore(FileHandle file, ExpertIndex index) : StoreBase(std::move(file), std::move(index)) {
    size_ = index_.digests.size() * index_.record_stride;
    // Kernels want 16 KiB alignment and mmap promises a page: reserve more and map the file inside the reservation.
    reserved_ = size_ + kBufferAlignment;
    reservation_ = ::mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reservation_ == MAP_FAILED) fail("reserve addresses for");
    uintptr_t aligned =
        (reinterpret_cast<uintptr_t>(reservation_) + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
    void* mapped =
        ::mmap(reinterpret_cast<void*>(aligned), size_, PROT_READ, MAP_SHARED | MAP_FIXED, file_.descriptor(), 0);
    if (mapped == MAP_FAILED) {
      int reason = errno;
      ::munmap(reservation_, reserved_);
      errno = reason;
      fail("map");
    }
    base_ = static_cast<std::byte*>(mapped);
    // Records are read one by one in no order; the system's read-ahead beyond a record would only cost memory. Advice
    // only.
    ::madvise(base_, size_, MADV_RANDOM);
  }
  ~MmapStore() override { ::munmap(reservation_, reserved_); }

  IoMode mode() const override { return IoMode::kMmap; }
  std::string warning() const override { return ""; }

  uint64_t read(ExpertKey key, void* destination) override {
    std::memcpy(destination, map(key), index_.record_bytes);
    return index_.record_bytes;
  }

  void* map(ExpertKey key) override {
    size_t record = record_of(key);
    // A file that was cut after opening would raise SIGBUS below instead of an error.
    if (file_.size() < size_) {
      throw Error(name_of(key) + " is cut short: the file now has " + std::to_string(file_.size()) +
                  " bytes; copy the artifact again");
    }
    std::byte* address = base_ + record * index_.record_stride;
    ::madvise(address, index_.record_bytes, MADV_WILLNEED);
    const volatile std::byte* pages = address;
    for (uint64_t offset = 0; offset < index_.record_bytes; offset += kDirectAlignment) (void)pages[offset];
    verify(key, record, address);
    return address;
  }

  void unmap(ExpertKey key) override {
    auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    size_t offset = record_of(key) * index_.record_stride;
    // Only pages that belong to this record alone: some systems have pages larger than the records' alignment.
    size_t begin = (offset + page - 1) / page * page;
    size_t end = (offset + index_.record_stride) / page * page;
    if (begin < end) ::madvise(base_ + begin, end - begin, MADV_DONTNEED);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error("cannot " + what + " " + file_.path() + ": " + std::strerror(errno) +
                "; use --io buffered or --io auto");
  }

  size_t size_ = 0, reserved_ = 0;
  void* reservation_ = nullptr;
  std::byte* base_ = nullptr;
};

}  // namespace

IoMode parse_io_mode(const std::string& name) {
  for (IoMode mode : {IoMode::kAuto, IoMode::kDirect, IoMode::kBuffered, IoMode::kMmap}) {
    if (name == io_mode_name(mode)) return mode;
  }
  throw Error("I/O mode \"" + name + "\" is unknown; use auto, direct, buffered or mmap");
}

const char* io_mode_name(IoMode mode) {
  switch (mode) {
    case IoMode::kAuto: return "auto";
    case IoMode::kDirect: return "direct";
    case IoMode::kBuffered: return "buffered";
    case IoMode::kMmap: return "mmap";
  }
  throw Error(ErrorKind::kInternal, "I/O mode " + std::to_string(static_cast<int>(mode)) + " is unknown");
}

std::unique_ptr<ExpertStore> open_expert_store(const std::string& path, const ExpertIndex& index, IoMode mode) {
  std::string warning;
  FileHandle file = open_data_file(path, mode, &warning);
  if (mode == IoMode::kMmap) return std::make_unique<MmapStore>(std::move(file), index);
  return std::make_unique<ReadStore>(std::move(file), index, warning);
}

}  // namespace cfmoe
