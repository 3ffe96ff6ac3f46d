// Byte-level BPE as tokenizer.json describes it: text to token ids, exactly as the package `tokenizers` does, and back.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/pre_tokenizer.h"

namespace cfmoe {

// Bytes [begin, end) of a text.
struct TextRange {
  size_t begin, end;
};

class ByteLevelBpe {
 public:
  // `json` is tokenizer.json, `path` what messages call it. Throws cfmoe::Error where it is damaged or a tokenizer of
  // another kind.
  ByteLevelBpe(std::string_view json, const std::string& path);

  int32_t vocab_size() const { return static_cast<int32_t>(pieces_.size()); }
  // Appends the ids of `text`; no special token is added, but those written in the text are found. Throws cfmoe::Error
  // where the text is no UTF-8.
  void encode(std::string_view text, std::vector<int32_t>* out) const { encode(text, {}, out); }
  // The same, but special tokens that touch one of the ranges `plain` are not looked for: there they are text.
  void encode(std::string_view text, std::span<const TextRange> plain, std::vector<int32_t>* out) const;
  // The bytes of a token; a character may be spread over several tokens. Empty for a special token if `skip_special`,
  // and for ids that are no token.
  std::string_view bytes(int32_t token, bool skip_special) const;

 private:
  struct Merge {
    int32_t rank, result;
  };
  struct AddedToken {
    std::string content;
    int32_t id;
  };
  explicit ByteLevelBpe(const JsonValue& root);
  void read_model(const JsonValue& model);
  void read_added(const JsonValue& tokens);
  void add_piece(int32_t id, std::string piece);
  static const AddedToken* longest(const std::vector<AddedToken>& tokens, std::string_view text);
  template <typename Take, typename IsText>
  static void cut(const std::vector<AddedToken>& tokens, std::string_view text, std::vector<int32_t>* out,
                  const IsText& is_text, const Take& take);
  void encode_piece(std::string_view piece, std::vector<int32_t>* out) const;

  PreTokenizer pre_tokenizer_;
  bool ignore_merges_ = false;
  std::array<int32_t, 256> byte_tokens_{};
  std::unordered_map<uint64_t, Merge> merges_;            // left id << 32 | right id
  std::unordered_map<std::string, int32_t> whole_words_;  // bytes → id; only with ignore_merges
  std::vector<AddedToken> added_, added_normalized_;      // longest first
  std::vector<std::string> pieces_;                       // bytes, by id
  std::vector<bool> special_;
};

// Turns the bytes of tokens, one token at a time, into text that ends at a character's end. What is no UTF-8 becomes
// U+FFFD.
class TextStream {
 public:
  std::string push(std::string_view bytes);
  std::string flush();

 private:
  std::string pending_;
};

}  // namespace cfmoe
