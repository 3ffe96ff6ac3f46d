// index.json: where each resident tensor and each expert record lies.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace cfmoe {

struct TensorEntry {
  std::string name;
  uint64_t offset = 0;  // bytes into weights.bin, a multiple of 64
  uint64_t size = 0;    // bytes
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t xxh3_64 = 0;
};

struct ExpertIndex {
  std::string format;  // q4, q8, f16, f32
  int32_t layers = 0;
  int32_t experts = 0;
  uint64_t record_bytes = 0;
  uint64_t record_stride = 0;  // a multiple of 16 KiB
  uint64_t gate_up_offset = 0, gate_up_size = 0;
  uint64_t down_offset = 0, down_size = 0;
  std::vector<uint64_t> digests;  // [layers * experts]
};

struct ArtifactIndex {
  std::vector<TensorEntry> weights;
  ExpertIndex experts;
};

// Parses and bounds every number against the sizes of weights.bin and experts.bin; throws cfmoe::Error naming `path`
// and the field.
ArtifactIndex parse_index(std::string_view text, const std::string& path, uint64_t weights_size, uint64_t experts_size);

}  // namespace cfmoe
