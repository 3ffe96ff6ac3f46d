// Anonymous mappings, trimmed to their alignment.
#include "store/aligned_buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "error.h"

namespace cfmoe {
namespace {

size_t page_size() {
  static const auto size = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t size) {
  if (size == 0) return;
  if (size > std::numeric_limits<size_t>::max() - 4 * kBufferAlignment)
    throw Error("cannot reserve " + std::to_string(size) + " bytes");
  size = (size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
  size_t reserved = size + kBufferAlignment;
  void* raw = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) {
    throw Error("cannot reserve " + std::to_string(size) + " bytes of memory: " + std::strerror(errno) +
                "; choose a smaller memory budget");
  }
  auto begin = reinterpret_cast<uintptr_t>(raw);
  uintptr_t aligned = (begin + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
  size_t head = aligned - begin, tail = kBufferAlignment - head;
  // With pages larger than 16 KiB the mapping is aligned already and the tail is no whole page.
  if (head > 0) ::munmap(raw, head);
  if (tail > 0 && (aligned + size) % page_size() == 0) ::munmap(reinterpret_cast<void*>(aligned + size), tail);
  data_ = reinterpret_cast<std::byte*>(aligned);
  size_ = size;
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void AlignedBuffer::give_back(size_t offset, size_t size) {
  size_t page = page_size();
  size_t begin = (offset + page - 1) / page * page;
  size_t end = (offset + size) / page * page;
  if (begin >= end || end > (size_ + page - 1) / page * page) return;
#if defined(__APPLE__)
  // MADV_DONTNEED is only a hint there; mapping fresh pages over the range frees the old ones.
  void* fresh =
      ::mmap(data_ + begin, end - begin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  bool failed = fresh == MAP_FAILED;
#else
  bool failed = ::madvise(data_ + begin, end - begin, MADV_DONTNEED) != 0;
#endif
  if (failed) throw Error(ErrorKind::kInternal, std::string("cannot give memory back: ") + std::strerror(errno));
}

}  // namespace cfmoe
