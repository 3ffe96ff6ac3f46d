// Loads the always-resident tensors of weights.bin into one block of memory and verifies each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
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

// The same in pieces of at most 4 MiB, for memory that files cannot be read into: `take` gets each tensor's bytes in
// order, with the tensor's place in `weights` and their offset in it. Returns the warning. A damaged tensor is told of
// once all of it has been taken.
using TakeTensorBytes = std::function<void(size_t tensor, uint64_t offset, std::span<const std::byte> bytes)>;
std::string stream_weights(const std::string& path, const std::vector<TensorEntry>& weights, IoMode mode,
                           const TakeTensorBytes& take);

}  // namespace cfmoe
