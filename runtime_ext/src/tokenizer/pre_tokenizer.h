// Cuts text into the pieces that are encoded one by one, as the pre-tokenizers of tokenizer.json say.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "artifact/json_reader.h"

namespace cfmoe {

class PreTokenizer {
 public:
  // `value` is the field pre_tokenizer. Throws cfmoe::Error naming what this runtime does not know.
  explicit PreTokenizer(const JsonValue& value);

  // `text` is UTF-8. Pieces come in order and make up the text, but for a space that add_prefix_space puts first.
  void split(std::string_view text, const std::function<void(std::string_view)>& take) const;

 private:
  enum class Step {
    kDigits,     // numbers apart, each
    kDigitRuns,  // numbers apart, as long as they are
    kGpt2,       // the pattern of ByteLevel
    kWords1,     // the pattern of Qwen 2 and later: numbers one digit at a time
    kWords3,     // the same with up to three digits
  };
  void add(const JsonValue& value);

  std::vector<Step> steps_;
  bool prefix_space_ = false;
  bool byte_level_ = false;
};

}  // namespace cfmoe
