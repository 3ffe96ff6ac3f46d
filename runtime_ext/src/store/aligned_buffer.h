// Page-backed memory, aligned to 16 KiB, that can be given back to the system in parts.
#pragma once

#include <cstddef>
#include <utility>

namespace cfmoe {

inline constexpr size_t kBufferAlignment =
    16384;  // the largest page size of the platforms we run on, and enough for direct I/O

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Zero-filled; pages cost memory only once touched. Throws cfmoe::Error if the system refuses.
  explicit AlignedBuffer(size_t size);
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

  // Gives the whole pages inside [offset, offset + size) back to the system; they read as zeros afterwards.
  void give_back(size_t offset, size_t size);

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;  // a multiple of kBufferAlignment
};

}  // namespace cfmoe
