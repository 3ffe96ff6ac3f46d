// Anonymous mappings, trimmed to their alignment, of huge pages where that is asked for.
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

constexpr size_t kHugePage = size_t{2} << 20;

size_t page_size() {
  static const auto size = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t size, Pages pages) {
  if (size == 0) return;
  if (size > std::numeric_limits<size_t>::max() - 4 * kHugePage)
    throw Error("cannot reserve " + std::to_string(size) + " bytes");
  size = (size + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
  const size_t alignment = pages == Pages::kHuge && size >= kHugePage ? kHugePage : kBufferAlignment;
  size_t reserved = size + alignment;
  void* raw = ::mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) {
    throw Error("cannot reserve " + std::to_string(size) + " bytes of memory: " + std::strerror(errno) +
                "; choose a smaller memory budget");
  }
  auto begin = reinterpret_cast<uintptr_t>(raw);
  uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  size_t head = aligned - begin, tail = alignment - head;
  // With pages larger than 16 KiB the mapping is aligned already and the tail is no whole page.
  if (head > 0) ::munmap(raw, head);
  if (tail > 0 && (aligned + size) % page_size() == 0) ::munmap(reinterpret_cast<void*>(aligned + size), tail);
  data_ = reinterpret_cast<std::byte*>(aligned);
  size_ = size;
#if defined(MADV_HUGEPAGE)
  // Advice: a system without them says no, and nothing changes.
  if (alignment == kHugePage && ::madvise(data_, size_, MADV_HUGEPAGE) == 0) huge_.assign(size_ / kHugePage, true);
#endif
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void AlignedBuffer::give_back(size_t offset, size_t size) {
  size_t page = page_size();
  size_t begin = (offset + page - 1) / page * page;
  size_t end = (offset + size) / page * page;
  if (begin >= end || end > (size_ + page - 1) / page * page) return;
  // The system keeps a huge page until all of it is free.
  if (begin % kHugePage != 0) break_up(begin / kHugePage);
  if (end % kHugePage != 0) break_up(end / kHugePage);
  discard(begin, end);
}

// Puts what is in a huge page into small ones.
void AlignedBuffer::break_up(size_t huge_page) {
#if defined(MADV_NOHUGEPAGE)
  if (huge_page >= huge_.size() || !huge_[huge_page]) return;
  const size_t begin = huge_page * kHugePage, page = page_size();
  std::vector<unsigned char> resident(kHugePage / page);
  if (::mincore(data_ + begin, kHugePage, resident.data()) != 0) return;
  // Not from the heap, which would keep the room.
  const AlignedBuffer kept(kHugePage);
  std::memcpy(kept.data(), data_ + begin, kHugePage);
  if (::madvise(data_ + begin, kHugePage, MADV_NOHUGEPAGE) != 0) return;
  huge_[huge_page] = false;
  discard(begin, begin + kHugePage);
  for (size_t i = 0; i < resident.size(); ++i) {
    if ((resident[i] & 1) != 0) std::memcpy(data_ + begin + i * page, kept.data() + i * page, page);
  }
#else
  (void)huge_page;
#endif
}

void AlignedBuffer::discard(size_t begin, size_t end) {
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
