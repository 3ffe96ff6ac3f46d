// XXH3-64 through the vendored single-header xxHash.
#include "artifact/checksum.h"

#include <new>

#define XXH_INLINE_ALL
#include "xxhash/xxhash.h"

namespace cfmoe {

uint64_t xxh3_64(const void* data, size_t size) { return XXH3_64bits(data, size); }

DigestStream::DigestStream() : state_(XXH3_createState()) {
  if (state_ == nullptr || XXH3_64bits_reset(static_cast<XXH3_state_t*>(state_)) == XXH_ERROR) throw std::bad_alloc();
}

DigestStream::~DigestStream() { XXH3_freeState(static_cast<XXH3_state_t*>(state_)); }

void DigestStream::add(const void* data, size_t size) {
  XXH3_64bits_update(static_cast<XXH3_state_t*>(state_), data, size);
}

uint64_t DigestStream::value() const { return XXH3_64bits_digest(static_cast<const XXH3_state_t*>(state_)); }

std::string format_digest(uint64_t digest) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text(16, '0');
  for (size_t i = 16; i-- > 0; digest >>= 4) text[i] = kDigits[digest & 15];
  return text;
}

bool parse_digest(std::string_view text, uint64_t* out) {
  if (text.size() != 16) return false;
  uint64_t digest = 0;
  for (char c : text) {
    uint64_t digit = 0;
    if (c >= '0' && c <= '9') {
      digit = static_cast<uint64_t>(c - '0');
    } else if (c >= 'a' && c <= 'f') {
      digit = static_cast<uint64_t>(c - 'a') + 10;
    } else {
      return false;
    }
    digest = digest << 4 | digit;
  }
  *out = digest;
  return true;
}

}  // namespace cfmoe
