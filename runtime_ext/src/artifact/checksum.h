// XXH3-64 (seed 0), the digest that the engine checks, and its text form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace cfmoe {

uint64_t xxh3_64(const void* data, size_t size);
inline uint64_t xxh3_64(std::string_view data) { return xxh3_64(data.data(), data.size()); }

// The same of bytes that come in parts.
class DigestStream {
 public:
  DigestStream();
  ~DigestStream();
  DigestStream(const DigestStream&) = delete;
  DigestStream& operator=(const DigestStream&) = delete;
  void add(const void* data, size_t size);
  uint64_t value() const;

 private:
  void* state_;
};

// 16 lower-case hexadecimal digits.
std::string format_digest(uint64_t digest);
// False unless `text` is exactly that form.
bool parse_digest(std::string_view text, uint64_t* out);

}  // namespace cfmoe
