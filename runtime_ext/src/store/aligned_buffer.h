// Page-backed memory, aligned to 16 KiB, that can be given back to the system in parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace cfmoe {

inline constexpr size_t kBufferAlignment =
    16384;  // the largest page size of the platforms we run on, and enough for direct I/O

// kHuge: pages of 2 MiB where the system has them and a whole one fits inside the buffer, so that none of them costs
// more than the buffer's size. For what is read into and filled altogether: a page is memory as soon as one byte is
// touched. A direct read then has a hundredth of the pieces, which some drives take twice as fast.
enum class Pages : uint8_t { kSmall, kHuge };

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Zero-filled; pages cost memory only once touched. Throws cfmoe::Error if the system refuses.
  explicit AlignedBuffer(size_t size, Pages pages = Pages::kSmall);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept { *this = std::move(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(huge_, other.huge_);
    return *this;
  }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // Gives the whole small pages inside [offset, offset + size) back to the system; they read as zeros afterwards.
  // Nobody else uses the buffer meanwhile.
  void give_back(size_t offset, size_t size);

 private:
  void discard(size_t begin, size_t end);
  void break_up(size_t huge_page);

  std::byte* data_ = nullptr;
  size_t size_ = 0;         // a multiple of kBufferAlignment
  std::vector<bool> huge_;  // per 2 MiB: may be a huge page
};

}  // namespace cfmoe
