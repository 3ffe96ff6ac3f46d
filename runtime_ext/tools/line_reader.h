// Reads lines of bounded length: what arrives on standard input is not trusted to end.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <string>

namespace cfmoe::tools {

// Lines of bounded length from a descriptor; a longer one is skipped and said to be so.
class LineReader {
 public:
  static constexpr size_t kMaxLine = size_t{8} << 20;

  explicit LineReader(int descriptor) : descriptor_(descriptor) {}

  // False at the end. `too_long` says that the line was skipped.
  bool next(std::string* line, bool* too_long) {
    line->clear();
    *too_long = false;
    for (;;) {
      const size_t end = buffer_.find('\n', from_);
      const size_t size = std::min(end, buffer_.size()) - from_;
      if (!*too_long) line->append(buffer_, from_, size);
      if (line->size() > kMaxLine) {
        *too_long = true;
        line->clear();
      }
      if (end != std::string::npos) {
        from_ = end + 1;
        return true;
      }
      from_ = 0;
      buffer_.resize(size_t{64} << 10);
      ssize_t got;
      do {
        got = ::read(descriptor_, buffer_.data(), buffer_.size());
      } while (got < 0 && errno == EINTR);
      buffer_.resize(got > 0 ? static_cast<size_t>(got) : 0);
      if (got <= 0) return !line->empty() || *too_long;
    }
  }

 private:
  int descriptor_;
  std::string buffer_;
  size_t from_ = 0;
};

}  // namespace cfmoe::tools
