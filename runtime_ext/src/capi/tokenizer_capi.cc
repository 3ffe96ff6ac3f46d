// The C API of the tokenizer.
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/artifact_files.h"
#include "capi/guard.h"
#include "cfmoe/cfmoe.h"
#include "tokenizer/byte_level_bpe.h"

using cfmoe::capi::guarded;
using cfmoe::capi::require;

struct cfmoe_tokenizer {
  cfmoe::ByteLevelBpe bpe;
  cfmoe::TextStream stream;
};

namespace {

constexpr char kFile[] = "tokenizer.json";

cfmoe::ByteLevelBpe open_tokenizer(const std::string& directory) {
  const cfmoe::Manifest manifest = cfmoe::read_manifest(directory);
  return {cfmoe::read_verified(directory, manifest, kFile), directory + "/" + kFile};
}

}  // namespace

cfmoe_status cfmoe_tokenizer_open(const char* artifact, cfmoe_tokenizer** out, char* error, size_t error_size) {
  if (out != nullptr) *out = nullptr;
  return guarded(error, error_size, [&] {
    require(artifact != nullptr && out != nullptr, "artifact or out is NULL");
    *out = new cfmoe_tokenizer{open_tokenizer(artifact), {}};
  });
}

void cfmoe_tokenizer_close(cfmoe_tokenizer* tokenizer) { delete tokenizer; }

cfmoe_status cfmoe_tokenizer_encode(const cfmoe_tokenizer* tokenizer, const char* text, size_t text_size, int32_t* out,
                                    size_t capacity, size_t* count, char* error, size_t error_size) {
  return cfmoe_tokenizer_encode_typed(tokenizer, text, text_size, nullptr, 0, out, capacity, count, error, error_size);
}

cfmoe_status cfmoe_tokenizer_encode_typed(const cfmoe_tokenizer* tokenizer, const char* text, size_t text_size,
                                          const size_t* plain, size_t plain_count, int32_t* out, size_t capacity,
                                          size_t* count, char* error, size_t error_size) {
  if (count != nullptr) *count = 0;
  return guarded(error, error_size, [&] {
    require(tokenizer != nullptr && count != nullptr, "tokenizer or count is NULL");
    require(text != nullptr || text_size == 0, "text is NULL");
    require(plain != nullptr || plain_count == 0, "plain is NULL");
    std::vector<cfmoe::TextRange> ranges(plain_count);
    for (size_t i = 0; i < plain_count; ++i) {
      ranges[i] = {plain[2 * i], plain[2 * i + 1]};
      require(ranges[i].begin <= ranges[i].end && ranges[i].end <= text_size,
              "plain holds what is no range of the text");
    }
    std::vector<int32_t> ids;
    tokenizer->bpe.encode(std::string_view(text, text_size), ranges, &ids);
    if (out != nullptr) std::copy_n(ids.begin(), std::min(capacity, ids.size()), out);
    *count = ids.size();
  });
}

cfmoe_status cfmoe_tokenizer_push(cfmoe_tokenizer* tokenizer, int32_t token, char* out, size_t capacity, size_t* size,
                                  char* error, size_t error_size) {
  if (size != nullptr) *size = 0;
  return guarded(error, error_size, [&] {
    require(tokenizer != nullptr && size != nullptr, "tokenizer or size is NULL");
    require(out != nullptr || capacity == 0, "out is NULL");
    const std::string text =
        token < 0 ? tokenizer->stream.flush() : tokenizer->stream.push(tokenizer->bpe.bytes(token, true));
    *size = text.size();
    if (text.size() >= capacity)
      throw cfmoe::Error("the text of " + std::to_string(text.size()) + " bytes does not fit in " +
                         std::to_string(capacity));
    std::copy(text.begin(), text.end(), out);
    out[text.size()] = '\0';
  });
}
