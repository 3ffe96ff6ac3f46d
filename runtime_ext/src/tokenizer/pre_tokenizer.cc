// The patterns of byte-level tokenizers, written out as scanners over characters.
#include "tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <array>
#include <utility>

#include "tokenizer/unicode.h"

namespace cfmoe {
namespace {

using unicode::is_letter;
using unicode::is_number;
using unicode::is_space;

constexpr char kGpt2Pattern[] = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kWords1Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr char kWords3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

bool is_break(uint32_t point) { return point == '\r' || point == '\n'; }
bool is_other(uint32_t point) { return !is_space(point) && !is_letter(point) && !is_number(point); }

// Characters of a text and where each begins.
class Characters {
 public:
  explicit Characters(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
      const unicode::Decoded character = unicode::decode_utf8(text, at);
      points_.push_back(character.point);
      places_.push_back(at);
      at += character.size;
    }
    places_.push_back(text.size());
  }
  size_t size() const { return points_.size(); }
  uint32_t operator[](size_t i) const { return points_[i]; }
  size_t place(size_t i) const { return places_[i]; }
  template <typename Is>
  size_t run(size_t from, const Is& is, size_t most = SIZE_MAX) const {
    size_t end = from;
    while (end < size() && end - from < most && is(points_[end])) ++end;
    return end;
  }

 private:
  std::vector<uint32_t> points_;
  std::vector<size_t> places_;
};

// The end of 's, 't, 're, 've, 'm, 'll or 'd at `at`, or `at`.
size_t contraction(const Characters& text, size_t at, bool any_case) {
  if (text[at] != '\'') return at;
  const auto letter = [&](size_t i) -> uint32_t {
    if (i >= text.size()) return 0;
    const uint32_t point = text[i];
    if (!any_case) return point;
    if (point == 0x17F) return 's';  // the long s folds to it
    return point >= 'A' && point <= 'Z' ? point + 32 : point;
  };
  const uint32_t first = letter(at + 1), second = letter(at + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return at + 2;
  if ((second == 'e' && (first == 'r' || first == 'v')) || (first == 'l' && second == 'l')) return at + 3;
  return at;
}

// \s+(?!\S)|\s+ at `at`, which is a space: a word takes the space before it.
size_t spaces(const Characters& text, size_t at) {
  const size_t end = text.run(at, is_space);
  return end < text.size() && end > at + 1 ? end - 1 : end;
}

size_t gpt2(const Characters& text, size_t at) {
  if (const size_t end = contraction(text, at, false); end > at) return end;
  const size_t word = text[at] == ' ' ? at + 1 : at;
  for (const auto is : {is_letter, is_number, is_other}) {
    if (const size_t end = text.run(word, is); end > word) return end;
  }
  return spaces(text, at);
}

size_t words(const Characters& text, size_t at, size_t digits) {
  if (const size_t end = contraction(text, at, true); end > at) return end;
  const bool lead = !is_break(text[at]) && !is_letter(text[at]) && !is_number(text[at]);
  if (const size_t end = text.run(at + (lead ? 1 : 0), is_letter); end > at + (lead ? 1 : 0)) return end;
  if (const size_t end = text.run(at, is_number, digits); end > at) return end;
  const size_t word = text[at] == ' ' ? at + 1 : at;
  if (const size_t end = text.run(word, is_other); end > word) return text.run(end, is_break);
  // \s*[\r\n]+ ends after the last line break of the run.
  const size_t end = text.run(at, is_space);
  for (size_t last = end; last > at; --last) {
    if (is_break(text[last - 1])) return last;
  }
  return spaces(text, at);
}

}  // namespace

PreTokenizer::PreTokenizer(const JsonValue& value) {
  if (value.is_null()) value.fail("is null: this runtime reads byte-level tokenizers");
  if (value.at("type").string() == "Sequence") {
    for (const JsonValue& each : value.at("pretokenizers").elements(16)) add(each);
  } else {
    add(value);
  }
  if (!byte_level_) value.fail("has no ByteLevel: this runtime reads byte-level tokenizers");
}

void PreTokenizer::add(const JsonValue& value) {
  if (byte_level_) value.fail("comes after ByteLevel, which this runtime takes for the last");
  const std::string type = value.at("type").string();
  if (type == "Digits") {
    steps_.push_back(value.at("individual_digits").boolean() ? Step::kDigits : Step::kDigitRuns);
  } else if (type == "Split") {
    static const std::array<std::pair<const char*, Step>, 3> known = {
        {{kGpt2Pattern, Step::kGpt2}, {kWords1Pattern, Step::kWords1}, {kWords3Pattern, Step::kWords3}}};
    const std::string pattern = value.at("pattern").at("Regex").string();
    const auto* found =
        std::find_if(known.begin(), known.end(), [&](const auto& each) { return pattern == each.first; });
    if (found == known.end()) value.fail("has a pattern that this runtime does not know");
    if (value.at("behavior").string() != "Isolated" || value.at("invert").boolean())
      value.fail("keeps its pieces in a way that this runtime does not know");
    steps_.push_back(found->second);
  } else if (type == "ByteLevel") {
    byte_level_ = true;
    prefix_space_ = value.at("add_prefix_space").boolean();
    if (prefix_space_ && !steps_.empty())
      value.fail("puts a space before every piece, which this runtime does not know");
    const auto use_regex = value.find("use_regex");
    if (!use_regex || use_regex->boolean()) steps_.push_back(Step::kGpt2);
  } else {
    value.fail("is of type \"" + type + "\", which this runtime does not know");
  }
}

void PreTokenizer::split(std::string_view text, const std::function<void(std::string_view)>& take) const {
  std::string prefixed;
  if (prefix_space_ && !text.starts_with(' ')) {
    prefixed = " ";
    prefixed += text;
    text = prefixed;
  }
  std::vector<std::string_view> pieces = {text}, next;
  for (const Step step : steps_) {
    next.clear();
    for (const std::string_view piece : pieces) {
      const Characters characters(piece);
      for (size_t at = 0; at < characters.size();) {
        size_t end = at;
        switch (step) {
          case Step::kDigits:
          case Step::kDigitRuns:
            end = characters.run(at, unicode::is_digit, step == Step::kDigits ? 1 : SIZE_MAX);
            if (end == at) end = characters.run(at, [](uint32_t point) { return !unicode::is_digit(point); });
            break;
          case Step::kGpt2: end = gpt2(characters, at); break;
          case Step::kWords1: end = words(characters, at, 1); break;
          case Step::kWords3: end = words(characters, at, 3); break;
        }
        next.push_back(piece.substr(characters.place(at), characters.place(end) - characters.place(at)));
        at = end;
      }
    }
    pieces.swap(next);
  }
  for (const std::string_view piece : pieces) take(piece);
}

}  // namespace cfmoe
