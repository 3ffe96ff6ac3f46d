// manifest.json: what the model is and which files belong to it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace cfmoe {

struct FileEntry {
  uint64_t size = 0;
  uint64_t xxh3_64 = 0;
};

struct TargetEntry {
  std::string name;
  std::string device;  // cpu, vulkan, opencl, metal
  std::string arch;    // x86_64, aarch64; generic for a GPU
  std::vector<std::string> features;
  std::string kernel_set;  // names its kernels
  std::string library;     // relative paths, checked to stay inside the artifact
  std::string plan;
};

struct ModelFacts {
  std::string family, name;
  int32_t num_layers = 0, hidden_size = 0, vocab_size = 0, context_size = 0;
  int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  std::vector<int32_t> moe_layers;
  int32_t num_experts = 0, top_k = 0, expert_ffn_size = 0;
  std::string router_score;  // softmax, sigmoid
  bool router_renormalise = false;
  double router_scale = 1.0;
  std::vector<int32_t> eos_token_ids;
};

struct Manifest {
  ModelFacts model;
  int32_t prefill_chunk = 0;
  std::string kv_dtype;  // float16, float32
  std::string kernel_set;
  std::vector<TargetEntry> targets;
  std::map<std::string, FileEntry> files;
  std::vector<std::string> tokenizer_files;  // relative paths, each in `files`
};

// The format version that this runtime reads.
inline constexpr int32_t kFormatVersion = 1;

// Checks the seal, the version and every field; throws cfmoe::Error naming `path`, the field and the remedy.
Manifest parse_manifest(std::string_view text, const std::string& path);

}  // namespace cfmoe
