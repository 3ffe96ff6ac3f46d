// Says where a kernel finds one expert's record.
#pragma once

#include <cstdint>

namespace cfmoe {

// `base` is a 16 KiB aligned address, the record starts `word_offset` 32-bit words behind it, and `extent_words` words
// behind `base` may be read.
struct ExpertView {
  void* base = nullptr;
  int64_t extent_words = 0;
  int32_t word_offset = 0;
};

}  // namespace cfmoe
