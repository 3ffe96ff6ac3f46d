// A small valid artifact on disk for the tests, and the means to damage it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "artifact/checksum.h"
#include "artifact/cpu_features.h"
#include "artifact/index.h"

namespace cfmoe::test {

inline constexpr int32_t kLayers = 2, kExperts = 3;
inline constexpr uint64_t kRecordBytes = 20000, kStride = 32768;

class TempDir {
 public:
  TempDir() {
    const char* base = std::getenv("TMPDIR");
    std::string pattern = std::string(base != nullptr ? base : "/tmp") + "/cfmoe-test-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

inline void flip_bit(const std::string& path, size_t offset) {
  std::string bytes = read_file(path);
  bytes[offset] = static_cast<char>(bytes[offset] ^ 4);
  write_file(path, bytes);
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
  size_t at = text.find(from);
  if (at == std::string::npos) std::abort();
  return text.replace(at, from.size(), to);
}

// The text without its closing "\n}\n" or its old seal, sealed.
inline std::string seal(std::string text) {
  size_t end = text.rfind(",\n  \"xxh3_64\": \"");
  if (end == std::string::npos) end = text.rfind("\n}");
  if (end != std::string::npos) text.resize(end);
  std::string digest = format_digest(xxh3_64(text));
  return text + ",\n  \"xxh3_64\": \"" + digest + "\"\n}\n";
}

inline std::string record_of(int32_t layer, int32_t expert) {
  std::string record(kRecordBytes, '\0');
  for (size_t i = 0; i < record.size(); ++i) {
    record[i] = static_cast<char>(i * 7 + i / 256 + static_cast<size_t>(layer * 31 + expert * 5));
  }
  return record;
}

inline ExpertIndex expert_index() {
  ExpertIndex index;
  index.format = "q4";
  index.layers = kLayers;
  index.experts = kExperts;
  index.record_bytes = kRecordBytes;
  index.record_stride = kStride;
  index.gate_up_size = 12800;
  index.down_offset = 12800;
  index.down_size = 7200;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t expert = 0; expert < kExperts; ++expert) index.digests.push_back(xxh3_64(record_of(layer, expert)));
  }
  return index;
}

inline std::string experts_file() {
  std::string bytes;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int32_t expert = 0; expert < kExperts; ++expert) {
      std::string record = record_of(layer, expert);
      record.resize(kStride);
      bytes += record;
    }
  }
  return bytes;
}

inline std::string weights_file() {
  std::string bytes(4096, '\0');
  for (size_t i = 0; i < 1024 + 192; ++i) bytes[i] = static_cast<char>(i * 13);
  return bytes;
}

inline std::string index_text() {
  std::string weights = weights_file(), digests;
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    digests += layer == 0 ? "[" : ", [";
    for (int32_t expert = 0; expert < kExperts; ++expert) {
      digests += (expert == 0 ? "\"" : ", \"") + format_digest(xxh3_64(record_of(layer, expert))) + "\"";
    }
    digests += "]";
  }
  return "{\"version\": 1, \"weights\": ["
         "{\"name\": \"embedding\", \"offset\": 0, \"size\": 1024, \"dtype\": \"int32\", \"shape\": [16, 16], "
         "\"xxh3_64\": \"" +
         format_digest(xxh3_64(weights.data(), 1024)) +
         "\"}, {\"name\": \"norm\", \"offset\": 1024, \"size\": 192, \"dtype\": \"float16\", \"shape\": [96], "
         "\"xxh3_64\": \"" +
         format_digest(xxh3_64(weights.data() + 1024, 192)) +
         "\"}], \"experts\": {\"format\": \"q4\", \"layers\": 2, \"experts\": 3, \"record_bytes\": 20000, "
         "\"record_stride\": 32768, "
         "\"alignment\": 16384, \"sections\": {\"gate_up\": {\"offset\": 0, \"size\": 12800}, "
         "\"down\": {\"offset\": 12800, \"size\": 7200}}, \"xxh3_64\": [" +
         digests + "]}}\n";
}

inline std::string manifest_text(const std::map<std::string, std::string>& files,
                                 const std::string& arch = host_cpu().arch, const std::string& features = "[]") {
  std::string listed;
  for (const auto& [name, bytes] : files) {
    listed += (listed.empty() ? "\"" : ", \"") + name + "\": {\"size\": " + std::to_string(bytes.size()) +
              ", \"sha256\": \"0\", \"xxh3_64\": \"" + format_digest(xxh3_64(bytes)) + "\"}";
  }
  return seal(
      "{\n  \"format\": \"cfmoe-artifact\",\n  \"format_version\": 1,\n"
      "  \"model\": {\"family\": \"qwen3_moe\", \"name\": \"tiny\", \"parameters\": 1, \"num_layers\": 3, "
      "\"hidden_size\": 64,\n"
      "    \"vocab_size\": 100, \"context_size\": 128, \"num_heads\": 4, \"num_kv_heads\": 2, \"head_dim\": 16,\n"
      "    \"moe_layers\": [1, 2], \"num_experts\": 3, \"top_k\": 2, \"expert_ffn_size\": 32,\n"
      "    \"router\": {\"score\": \"softmax\", \"renormalise\": true, \"scale\": 1.0},\n"
      "    \"bos_token_id\": null, \"eos_token_ids\": [0, 99]},\n"
      "  \"prefill_chunk\": 16,\n  \"kv_dtype\": \"float16\",\n  \"kernel_set\": \"abc\",\n"
      "  \"targets\": {\"host\": {\"device\": \"cpu\", \"arch\": \"" +
      arch + "\", \"features\": " + features +
      ",\n    \"library\": \"lib/host/kernels.so\", \"plan\": \"lib/host/plan.json\"}},\n"
      "  \"tokenizer_files\": [\"tokenizer.json\"],\n  \"files\": {" +
      listed + "}\n}\n");
}

inline std::map<std::string, std::string> artifact_contents() {
  return {{"index.json", index_text()},       {"weights.bin", weights_file()}, {"experts.bin", experts_file()},
          {"lib/host/kernels.so", "kernels"}, {"lib/host/plan.json", "{}"},    {"tokenizer.json", "{\"a\": 1}"}};
}

// Writes the whole artifact into `directory`.
inline void write_artifact(const std::string& directory) {
  std::map<std::string, std::string> files = artifact_contents();
  for (const auto& [name, bytes] : files) write_file(directory + "/" + name, bytes);
  write_file(directory + "/manifest.json", manifest_text(files));
}

}  // namespace cfmoe::test
