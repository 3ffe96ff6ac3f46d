// Files opened through the page cache or past it.
#include "store/file_handle.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "error.h"
#include "store/aligned_buffer.h"

namespace cfmoe {
namespace {

// One system call moves at most about 2 GiB on Linux and macOS; smaller steps keep the length aligned.
constexpr uint64_t kMaxStep = uint64_t{1} << 30;

int open_descriptor(const std::string& path, int flags) {
  int descriptor = -1;
  do {
    descriptor = ::open(path.c_str(), flags | O_RDONLY | O_CLOEXEC);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

int64_t read_once(int descriptor, uint64_t offset, void* destination, uint64_t size) {
  int64_t got = 0;
  do {
    got = ::pread(descriptor, destination, std::min(size, kMaxStep), static_cast<off_t>(offset));
  } while (got < 0 && errno == EINTR);
  return got;
}

}  // namespace

FileHandle::~FileHandle() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

FileHandle::FileHandle(FileHandle&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), direct_(other.direct_), path_(std::move(other.path_)) {}

FileHandle& FileHandle::operator=(FileHandle&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(direct_, other.direct_);
  std::swap(path_, other.path_);
  return *this;
}

FileHandle FileHandle::open(const std::string& path) {
  FileHandle file;
  file.path_ = path;
  file.descriptor_ = open_descriptor(path, 0);
  if (file.descriptor_ < 0) {
    if (errno == ENOENT)
      throw Error(path + ": the file is missing; copy the artifact again or compile it again with cfmoe compile");
    throw Error(path + ": cannot be opened: " + std::strerror(errno) + "; check its permissions");
  }
  struct stat facts = {};
  if (::fstat(file.descriptor_, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    throw Error(path + ": is not a regular file; copy the artifact again or compile it again with cfmoe compile");
  }
  return file;
}

bool FileHandle::open_direct(const std::string& path, FileHandle* out, std::string* reason) {
  // A missing file is no matter of direct I/O.
  FileHandle file = FileHandle::open(path);
#if defined(__APPLE__)
  if (::fcntl(file.descriptor_, F_NOCACHE, 1) != 0) {
    *reason = std::strerror(errno);
    return false;
  }
#elif defined(O_DIRECT)
  int descriptor = open_descriptor(path, O_DIRECT);
  if (descriptor < 0) {
    *reason = std::strerror(errno);
    return false;
  }
  ::close(file.descriptor_);
  file.descriptor_ = descriptor;
#else
  *reason = "not available on this system";
  return false;
#endif
  AlignedBuffer probe(kDirectAlignment);
  if (file.size() > 0 && read_once(file.descriptor_, 0, probe.data(), kDirectAlignment) <= 0) {
    *reason = std::strerror(errno);
    return false;
  }
  file.direct_ = true;
  *out = std::move(file);
  return true;
}

uint64_t FileHandle::read_at(uint64_t offset, void* destination, uint64_t size) const {
  uint64_t done = 0, total = 0;
  while (done < size) {
    int64_t got = read_once(descriptor_, offset + done, static_cast<char*>(destination) + done, size - done);
    if (got < 0) {
      throw Error(ErrorKind::kInternal, path_ + ": reading " + std::to_string(size) + " bytes at " +
                                            std::to_string(offset) + " failed: " + std::strerror(errno) +
                                            "; check the drive");
    }
    if (done + static_cast<uint64_t>(got) <= total) break;  // nothing new: the end of the file
    total = done + static_cast<uint64_t>(got);
    // A direct read that was cut short inside a block goes on at the block's beginning.
    done = direct_ && total < size ? total / kDirectAlignment * kDirectAlignment : total;
  }
  return total;
}

uint64_t FileHandle::size() const {
  struct stat facts = {};
  if (::fstat(descriptor_, &facts) != 0) {
    throw Error(ErrorKind::kInternal, path_ + ": its size cannot be read: " + std::strerror(errno));
  }
  return static_cast<uint64_t>(facts.st_size);
}

FileHandle open_data_file(const std::string& path, IoMode mode, std::string* warning) {
  if (mode == IoMode::kBuffered || mode == IoMode::kMmap) return FileHandle::open(path);
  FileHandle file;
  std::string reason;
  if (FileHandle::open_direct(path, &file, &reason)) return file;
  if (mode == IoMode::kDirect) {
    throw Error(path + ": the file system refuses direct I/O (" + reason + "); use --io buffered or --io auto");
  }
  // Said of the directory, so that the files of one artifact say the same and it is shown once.
  const std::string directory = std::filesystem::path(path).parent_path().string();
  *warning = directory + ": the file system refuses direct I/O (" + reason + "); reading through the page cache";
  return FileHandle::open(path);
}

}  // namespace cfmoe
