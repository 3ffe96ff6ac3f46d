// Says where a kernel finds one expert's record.
#pragma once

#include <cstdint>

#include "cache/slab.h"

namespace cfmoe {

// `base` is a 16 KiB aligned address, the record starts `word_offset` 32-bit words behind it, and `extent_words` words
// behind `base` may be read. In a device's memory `slab` says whose, and `base` is null where the host does not reach
// it.
struct ExpertView {
  void* base = nullptr;
  int64_t extent_words = 0;
  int32_t word_offset = 0;
  const Slab* slab = nullptr;
};

}  // namespace cfmoe
