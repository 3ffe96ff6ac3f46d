// Byte-level BPE: merges, pieces, added tokens, and text back in whole characters.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "expect_error.h"
#include "fixtures.h"
#include "tokenizer/byte_level_bpe.h"
#include "tokenizer_fixture.h"

namespace cfmoe {
namespace {

std::string joined(const ByteLevelBpe& bpe, const std::string& text) {
  std::vector<int32_t> ids;
  bpe.encode(text, &ids);
  std::string out;
  for (const int32_t id : ids) out += (out.empty() ? "" : "|") + std::string(bpe.bytes(id, false));
  return out;
}

}  // namespace

TEST_CASE("tokenizer: pieces, merges by rank, added tokens") {
  const ByteLevelBpe bpe(test::tokenizer_text(), "tokenizer.json");
  CHECK(bpe.vocab_size() == 264);
  CHECK(joined(bpe, "the the thing") == "the| the| |th|ing");
  CHECK(joined(bpe, "12 in") == "1|2| |in");
  CHECK(joined(bpe, "a<|end|><|enx") == "a|<|end|>|<|en|x");
  CHECK(joined(bpe, "  \n x") == " | |\n| |x");
  CHECK(joined(bpe, "") == "");
  CHECK(bpe.bytes(262, true).empty());
  CHECK(bpe.bytes(-1, false).empty());
  CHECK(bpe.bytes(1 << 30, false).empty());
  std::vector<int32_t> ids;
  test::expect_error([&] { bpe.encode("ab\xC3", &ids); }, {"not UTF-8", "byte 2"});
}

TEST_CASE("tokenizer: a stream ends at a character's end") {
  TextStream stream;
  CHECK(stream.push("a\xE6") == "a");
  CHECK(stream.push("\x97") == "");
  CHECK(stream.push("\xA5\xF0\x9F") == "\u65E5");
  CHECK(stream.push("x") == "\uFFFDx");
  CHECK(stream.push("\xE6\x97") == "");
  CHECK(stream.flush() == "\uFFFD");
  CHECK(stream.flush() == "");
  CHECK(stream.push("\xFF\xC0\xAF") == "\uFFFD\uFFFD\uFFFD");
}

TEST_CASE("tokenizer: other kinds are refused") {
  const auto refused = [](const std::string& from, const std::string& to, const std::vector<std::string>& parts) {
    test::expect_error([&] { ByteLevelBpe(test::replaced(test::tokenizer_text(), from, to), "tokenizer.json"); },
                       parts);
  };
  refused("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", {"normalizer", "Python runtime"});
  refused("\"BPE\"", "\"WordPiece\"", {"WordPiece"});
  refused("\"byte_fallback\": false", "\"byte_fallback\": true", {"byte-level"});
  refused("[\"t\", \"h\"]", "[\"t\", \"q\"]", {"merges[0]", "not in the vocabulary"});
}

}  // namespace cfmoe
