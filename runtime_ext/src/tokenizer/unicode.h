// UTF-8, and the classes of characters by which tokenizers cut text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "tokenizer/unicode_tables.h"

namespace cfmoe::unicode {

template <size_t N>
bool contains(const Range (&ranges)[N], uint32_t point) {
  const Range* found = std::upper_bound(ranges, ranges + N, point,
                                        [](uint32_t value, const Range& range) { return value < range.first; });
  return found != ranges && point <= (found - 1)->last;
}

inline bool is_letter(uint32_t point) {
  return point < 128 ? (point | 32) >= 'a' && (point | 32) <= 'z' : contains(kLetters, point);
}
inline bool is_number(uint32_t point) { return point < 128 ? point >= '0' && point <= '9' : contains(kNumbers, point); }
inline bool is_space(uint32_t point) {
  return point < 128 ? point == ' ' || (point >= 9 && point <= 13) : contains(kSpaces, point);
}
// What the pre-tokenizer Digits cuts at.
inline bool is_digit(uint32_t point) { return contains(kDigits, point); }

inline void append_utf8(uint32_t point, std::string* out) {
  if (point < 0x80) {
    out->push_back(static_cast<char>(point));
    return;
  }
  const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
  static constexpr uint32_t kLead[] = {0, 0xC0, 0xE0, 0xF0};
  out->push_back(static_cast<char>(kLead[more] | point >> (6 * more)));
  for (int i = more - 1; i >= 0; --i) out->push_back(static_cast<char>(0x80 | (point >> (6 * i) & 0x3F)));
}

struct Decoded {
  uint32_t point = 0;
  // Bytes of the character; where it is none, of the longest part that could have begun one (at least 1).
  size_t size = 0;
  bool valid = false;
  bool cut_off = false;  // the text ends within it
};

// The character at `at`, which is less than the text's size.
inline Decoded decode_utf8(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[i])); };
  const uint32_t lead = byte(at);
  if (lead < 0x80) return {lead, 1, true, false};
  if (lead < 0xC2 || lead > 0xF4) return {0, 1, false, false};
  const size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint32_t point = lead & (0x7FU >> size);
  for (size_t i = 1; i < size; ++i) {
    if (at + i >= text.size()) return {0, i, false, true};
    uint32_t low = 0x80, high = 0xBF;
    if (i == 1) {  // no overlong forms, no surrogates, nothing above U+10FFFF
      if (lead == 0xE0) low = 0xA0;
      if (lead == 0xED) high = 0x9F;
      if (lead == 0xF0) low = 0x90;
      if (lead == 0xF4) high = 0x8F;
    }
    const uint32_t next = byte(at + i);
    if (next < low || next > high) return {0, i, false, false};
    point = point << 6 | (next & 0x3F);
  }
  return {point, size, true, false};
}

}  // namespace cfmoe::unicode
