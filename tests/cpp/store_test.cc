// Expert records and resident tensors in every I/O mode, whole and damaged.
#include <doctest/doctest.h>

#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "expect_error.h"
#include "fixtures.h"
#include "store/aligned_buffer.h"
#include "store/expert_store.h"
#include "store/file_handle.h"
#include "store/weights_file.h"

using namespace cfmoe;
using namespace cfmoe::test;

namespace {

// Direct I/O only where the file system of the temporary directory takes it.
std::vector<IoMode> modes_for(const std::string& path) {
  std::vector<IoMode> modes = {IoMode::kAuto, IoMode::kBuffered, IoMode::kMmap};
  FileHandle file;
  std::string reason;
  if (FileHandle::open_direct(path, &file, &reason)) modes.push_back(IoMode::kDirect);
  return modes;
}

}  // namespace

TEST_CASE("aligned buffer: alignment and giving back") {
  AlignedBuffer buffer(100000);
  CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % kBufferAlignment == 0);
  CHECK(buffer.size() == 114688);
  std::memset(buffer.data(), 1, buffer.size());
  buffer.give_back(16384, 16384);
  CHECK(buffer.data()[16383] == std::byte{1});
  CHECK(buffer.data()[16384] == std::byte{0});
  CHECK(buffer.data()[32768] == std::byte{1});
  AlignedBuffer moved = std::move(buffer);
  CHECK(moved.data()[0] == std::byte{1});
  expect_error([] { AlignedBuffer(SIZE_MAX / 2); }, {"cannot reserve", "smaller memory budget"});
}

#if defined(__linux__)
namespace {

// Bytes of huge pages of the mapping that begins at `address`, by /proc/self/smaps.
size_t huge_bytes(const void* address) {
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<uintptr_t>(address);
  std::ifstream maps("/proc/self/smaps");
  std::string line, key;
  size_t kib = 0;
  bool inside = false;
  while (std::getline(maps, line)) {
    inside = inside || line.rfind(begin.str() + "-", 0) == 0;
    std::istringstream fields(line);
    if (inside && fields >> key >> kib && key == "AnonHugePages:") return kib << 10;
  }
  return 0;
}

}  // namespace

TEST_CASE("aligned buffer: huge pages are inside the buffer, and are broken up to give parts of them back") {
  constexpr size_t kMiB = size_t{1} << 20;
  AlignedBuffer buffer(7 * kMiB + 16384, Pages::kHuge);
  CHECK(buffer.size() == 7 * kMiB + 16384);
  CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % (2 * kMiB) == 0);
  std::memset(buffer.data(), 1, buffer.size());
  const size_t huge = huge_bytes(buffer.data());
  MESSAGE("huge pages here: " << huge / (2 * kMiB));
  CHECK(huge <= 6 * kMiB);
  const auto byte = [&](size_t offset) { return static_cast<int>(buffer.data()[offset]); };
  buffer.give_back(kMiB, 2 * kMiB);
  CHECK(byte(0) == 1);
  CHECK(byte(kMiB - 1) == 1);
  CHECK(byte(kMiB) == 0);
  CHECK(byte(3 * kMiB - 1) == 0);
  CHECK(byte(3 * kMiB) == 1);
  CHECK(byte(7 * kMiB + 16383) == 1);
  // What is left of a page that was broken up stays as it is when more of it goes.
  buffer.give_back(0, kMiB / 2);
  CHECK(byte(kMiB / 2 - 1) == 0);
  CHECK(byte(kMiB / 2) == 1);
  CHECK(huge_bytes(buffer.data()) == 0);
  CHECK(huge_bytes(buffer.data() + 4 * kMiB) <= 2 * kMiB);
  buffer.give_back(0, buffer.size());
  CHECK(byte(6 * kMiB) == 0);
  AlignedBuffer moved = std::move(buffer);
  CHECK(moved.data()[5 * kMiB] == std::byte{0});
}
#endif

TEST_CASE("io modes by name") {
  CHECK(parse_io_mode("direct") == IoMode::kDirect);
  CHECK(std::string(io_mode_name(parse_io_mode("mmap"))) == "mmap");
  expect_error([] { parse_io_mode("fast"); }, {"\"fast\"", "auto, direct, buffered or mmap"});
}

TEST_CASE("file handle: reads stop only at the end") {
  TempDir dir;
  write_file(dir / "f", std::string(5000, 'x'));
  std::string reason;
  FileHandle direct;
  bool takes_direct = FileHandle::open_direct(dir / "f", &direct, &reason);
  AlignedBuffer buffer(16384);
  CHECK(FileHandle::open(dir / "f").read_at(4990, buffer.data(), 100) == 10);
  CHECK(FileHandle::open(dir / "f").read_at(6000, buffer.data(), 100) == 0);
  if (takes_direct) {
    CHECK(direct.read_at(0, buffer.data(), 16384) == 5000);
    CHECK(direct.read_at(4096, buffer.data(), 4096) == 904);
  }
  expect_error([&] { FileHandle::open(dir / "g"); }, {dir / "g", "missing", "cfmoe compile"});
  expect_error([&] { FileHandle::open(dir.path()); }, {"not a regular file"});
}

#if defined(__linux__)
TEST_CASE("data file: auto falls back where direct I/O is refused, direct says so") {
  // procfs is a file system that always refuses it.
  std::string warning;
  CHECK(!open_data_file("/proc/version", IoMode::kAuto, &warning).direct());
  CHECK(warning.find("/proc: the file system refuses direct I/O") == 0);
  std::string another;
  open_data_file("/proc/cpuinfo", IoMode::kAuto, &another);
  CHECK(another == warning);
  expect_error([&] { open_data_file("/proc/version", IoMode::kDirect, &warning); },
               {"/proc/version", "refuses direct I/O", "--io buffered"});
}
#endif

TEST_CASE("expert store: every mode reads the same records and counts what it reads") {
  TempDir dir;
  std::string path = dir / "experts.bin";
  write_file(path, experts_file());
  for (IoMode mode : modes_for(path)) {
    INFO(io_mode_name(mode));
    std::unique_ptr<ExpertStore> store = open_expert_store(path, expert_index(), mode);
    CHECK(store->mode() != IoMode::kAuto);
    AlignedBuffer buffer(kStride);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t expert = 0; expert < kExperts; ++expert) {
        ExpertKey key{layer, expert};
        uint64_t got = store->read(key, buffer.data());
        CHECK(got == (store->mode() == IoMode::kDirect ? 20480 : kRecordBytes));
        CHECK(std::memcmp(buffer.data(), record_of(layer, expert).data(), kRecordBytes) == 0);
        void* mapped = store->map(key);
        CHECK((mapped != nullptr) == (mode == IoMode::kMmap));
        if (mapped == nullptr) continue;
        CHECK(reinterpret_cast<uintptr_t>(mapped) % kBufferAlignment == 0);
        CHECK(std::memcmp(mapped, record_of(layer, expert).data(), kRecordBytes) == 0);
        store->unmap(key);
        CHECK(std::memcmp(mapped, record_of(layer, expert).data(), kRecordBytes) == 0);
      }
    }
    expect_error([&] { store->read(ExpertKey{kLayers, 0}, buffer.data()); }, {"no record"});
  }
}

TEST_CASE("expert store: damaged, truncated and missing files") {
  TempDir dir;
  std::string path = dir / "experts.bin";
  expect_error([&] { open_expert_store(path, expert_index(), IoMode::kAuto); }, {path, "missing"});
  write_file(path, experts_file());
  for (IoMode mode : modes_for(path)) {
    INFO(io_mode_name(mode));
    AlignedBuffer buffer(kStride);
    flip_bit(path, 4 * kStride + 19999);
    {
      std::unique_ptr<ExpertStore> store = open_expert_store(path, expert_index(), mode);
      store->read(ExpertKey{1, 0}, buffer.data());
      // Every time: a record that failed once is not taken for verified.
      for (int i = 0; i < 2; ++i) {
        expect_error([&] { store->read(ExpertKey{1, 1}, buffer.data()); },
                     {path, "expert 1", "MoE layer 1", "damaged", "cfmoe compile"});
      }
      if (mode == IoMode::kMmap) expect_error([&] { store->map(ExpertKey{1, 1}); }, {path, "damaged"});
    }
    flip_bit(path, 4 * kStride + 19999);
    {
      std::unique_ptr<ExpertStore> store = open_expert_store(path, expert_index(), mode);
      std::filesystem::resize_file(path, 5 * kStride + 100);
      expect_error([&] { store->read(ExpertKey{1, 2}, buffer.data()); },
                   {path, "expert 2", "MoE layer 1", "cut short"});
    }
    expect_error([&] { open_expert_store(path, expert_index(), mode); }, {path, "163940 bytes", "196608"});
    write_file(path, experts_file());
  }
}

TEST_CASE("expert store: a record is verified on its first read only") {
  TempDir dir;
  std::string path = dir / "experts.bin";
  write_file(path, experts_file());
  std::unique_ptr<ExpertStore> store = open_expert_store(path, expert_index(), IoMode::kBuffered);
  AlignedBuffer buffer(kStride);
  store->read(ExpertKey{0, 0}, buffer.data());
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(10);
    file.put('!');
  }
  store->read(ExpertKey{0, 0}, buffer.data());
  CHECK(static_cast<char>(buffer.data()[10]) == '!');
}

TEST_CASE("expert store: several threads read at once") {
  TempDir dir;
  std::string path = dir / "experts.bin";
  write_file(path, experts_file());
  for (IoMode mode : modes_for(path)) {
    std::unique_ptr<ExpertStore> store = open_expert_store(path, expert_index(), mode);
    std::vector<std::thread> threads;
    std::atomic<int> equal = 0;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        AlignedBuffer buffer(kStride);
        for (int i = 0; i < 30; ++i) {
          store->read(ExpertKey{i % kLayers, i % kExperts}, buffer.data());
          if (std::memcmp(buffer.data(), record_of(i % kLayers, i % kExperts).data(), kRecordBytes) == 0) ++equal;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(equal == 90);
  }
}

TEST_CASE("weights: loaded and verified in every mode") {
  TempDir dir;
  std::string path = dir / "weights.bin";
  write_file(path, weights_file());
  std::vector<TensorEntry> tensors =
      parse_index(index_text(), "index.json", 4096, kStride * kLayers * kExperts).weights;
  for (IoMode mode : modes_for(path)) {
    INFO(io_mode_name(mode));
    LoadedWeights loaded = load_weights(path, tensors, mode);
    CHECK(std::memcmp(loaded.block.data(), weights_file().data(), 4096) == 0);
    flip_bit(path, 1024 + 191);
    expect_error([&] { load_weights(path, tensors, mode); }, {path, "tensor norm", "damaged", "cfmoe compile"});
    flip_bit(path, 1024 + 191);
    std::filesystem::resize_file(path, 1100);
    expect_error([&] { load_weights(path, tensors, mode); }, {path, "tensor norm", "outside"});
    write_file(path, weights_file());
  }
}
