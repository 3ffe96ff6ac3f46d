// A small valid tokenizer.json: the 256 bytes, a few merges and two added tokens.
#pragma once

#include <string>
#include <vector>

#include "tokenizer/unicode.h"

namespace cfmoe::test {

inline std::string tokenizer_text() {
  std::vector<std::string> entries;
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    std::string entry;
    if (byte == '"' || byte == '\\') entry = "\\";
    unicode::append_utf8(printable ? byte : next++, &entry);
    entries.push_back(entry);
  }
  for (const char* merged : {"th", "the", "\u0120t", "\u0120the", "in", "ing"}) entries.emplace_back(merged);
  std::string vocab;
  for (size_t id = 0; id < entries.size(); ++id)
    vocab += (id == 0 ? "\"" : ", \"") + entries[id] + "\": " + std::to_string(id);
  return R"({"normalizer": null, "decoder": {"type": "ByteLevel"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}]},
    "added_tokens": [{"id": 262, "content": "<|end|>", "special": true}, {"id": 263, "content": "<|en", "normalized": true}],
    "model": {"type": "BPE", "dropout": null, "ignore_merges": false, "byte_fallback": false,
      "merges": [["t", "h"], ["th", "e"], "Ġ t", ["Ġ", "the"], ["i", "n"], "in g"], "vocab": {)" +
         vocab + "}}}";
}

}  // namespace cfmoe::test
