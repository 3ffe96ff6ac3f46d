// A file opened for reading: whole reads at an offset, with the system's interruptions and short reads handled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "store/expert_store.h"

namespace cfmoe {

inline constexpr size_t kDirectAlignment =
    4096;  // offsets, lengths and addresses of direct reads; the largest block size of common drives

class FileHandle {
 public:
  FileHandle() = default;
  ~FileHandle();
  FileHandle(FileHandle&& other) noexcept;
  FileHandle& operator=(FileHandle&& other) noexcept;

  // Through the page cache. Throws cfmoe::Error naming the path and the reason.
  static FileHandle open(const std::string& path);
  // Past the page cache, proved by one read; false with a reason where the file system does not take it.
  static bool open_direct(const std::string& path, FileHandle* out, std::string* reason);

  // Reads up to `size` bytes from `offset`, less only at the end of the file, and returns how many. Throws cfmoe::Error
  // on an I/O error. A direct file wants all three arguments aligned to kDirectAlignment.
  uint64_t read_at(uint64_t offset, void* destination, uint64_t size) const;
  uint64_t size() const;
  bool direct() const { return direct_; }
  int descriptor() const { return descriptor_; }
  const std::string& path() const { return path_; }

 private:
  int descriptor_ = -1;
  bool direct_ = false;
  std::string path_;
};

// Opens a large file as `mode` asks (kMmap: through the page cache). What it became is direct() or not; `warning` is
// set where auto fell back. Throws cfmoe::Error where direct is asked for and refused.
FileHandle open_data_file(const std::string& path, IoMode mode, std::string* warning);

}  // namespace cfmoe
