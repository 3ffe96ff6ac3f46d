// Loads the always-resident tensors of weights.bin into one block of memory and verifies each.
#pragma once

#include <string>
#include <vector>

#include "artifact/index.h"
#include "store/aligned_buffer.h"
#include "store/expert_store.h"

namespace cfmoe {

struct LoadedWeights {
  AlignedBuffer block;  // tensor i lies at block.data() + weights[i].offset
  std::string warning;  // as ExpertStore::warning
};

// In mmap mode too the tensors are read into memory: every token needs all of them. Throws cfmoe::Error naming the file
// and the tensor.
LoadedWeights load_weights(const std::string& path, const std::vector<TensorEntry>& weights, IoMode mode);

}  // namespace cfmoe
