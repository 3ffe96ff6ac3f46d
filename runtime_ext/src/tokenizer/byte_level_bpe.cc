// Reads tokenizer.json, merges pairs by rank, and maps the printable stand-ins of bytes back to bytes.
#include "tokenizer/byte_level_bpe.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <queue>
#include <utility>

#include "error.h"
#include "tokenizer/unicode.h"

namespace cfmoe {
namespace {

constexpr int32_t kMaxTokens = 1 << 24;
constexpr char kRemedy[] = "use the Python runtime for this tokenizer, or give token ids";
constexpr char kReplacement[] = "\xEF\xBF\xBD";

// The character that stands for a byte in byte-level vocabularies: printable bytes stand for themselves, the others
// follow from U+0100 on (Radford et al. 2019, the GPT-2 encoder).
std::array<uint32_t, 256> byte_characters() {
  std::array<uint32_t, 256> out{};
  uint32_t next = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173);
    out[byte] = printable ? byte : next++;
  }
  return out;
}

// The bytes that a vocabulary entry stands for; its own text where a character stands for none.
std::string bytes_of(const std::string& entry) {
  static const std::unordered_map<uint32_t, char> bytes = [] {
    std::unordered_map<uint32_t, char> out;
    const std::array<uint32_t, 256> characters = byte_characters();
    for (size_t byte = 0; byte < 256; ++byte) out[characters[byte]] = static_cast<char>(byte);
    return out;
  }();
  std::string out;
  for (size_t at = 0; at < entry.size();) {
    const unicode::Decoded character = unicode::decode_utf8(entry, at);
    const auto found = bytes.find(character.point);
    if (!character.valid || found == bytes.end()) return entry;
    out.push_back(found->second);
    at += character.size;
  }
  return out;
}

void expect_absent(const JsonValue& object, const char* field) {
  const std::optional<JsonValue> value = object.find(field);
  if (!value || value->is_null() || (value->is_string() && value->string(true).empty())) return;
  value->fail("is set, which this runtime does not know");
}

bool flag(const JsonValue& object, const char* field) {
  const std::optional<JsonValue> value = object.find(field);
  return value && !value->is_null() && value->boolean();
}

JsonValue checked(const JsonValue& root) {
  expect_absent(root, "normalizer");
  const JsonValue decoder = root.at("decoder");
  if (decoder.is_null() || decoder.at("type").string() != "ByteLevel")
    decoder.fail("is not ByteLevel, the one kind that this runtime reads");
  return root;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

ByteLevelBpe::ByteLevelBpe(std::string_view json, const std::string& path)
    : ByteLevelBpe(checked(JsonValue::parse(json, path, kRemedy, {size_t{256} << 20, 64}))) {}

ByteLevelBpe::ByteLevelBpe(const JsonValue& root) : pre_tokenizer_(root.at("pre_tokenizer")) {
  read_model(root.at("model"));
  read_added(root.at("added_tokens"));
}

void ByteLevelBpe::add_piece(int32_t id, std::string piece) {
  const auto at = static_cast<size_t>(id);
  if (at >= pieces_.size()) {
    pieces_.resize(at + 1);
    special_.resize(at + 1);
  }
  pieces_[at] = std::move(piece);
}

void ByteLevelBpe::read_model(const JsonValue& model) {
  if (const std::string type = model.at("type").string(); type != "BPE")
    model.fail("is of type \"" + type + "\"; this runtime reads byte-level BPE");
  for (const char* field : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) expect_absent(model, field);
  if (flag(model, "byte_fallback")) model.fail("falls back to bytes, so it is not byte-level");
  ignore_merges_ = flag(model, "ignore_merges");

  const JsonValue vocab = model.at("vocab");
  const std::vector<std::string> entries = vocab.keys();
  if (entries.size() > static_cast<size_t>(kMaxTokens)) vocab.fail("has too many entries");
  std::unordered_map<std::string, int32_t> ids;
  ids.reserve(entries.size());
  for (const std::string& entry : entries) {
    const int32_t id = vocab.at(entry).int32(0, kMaxTokens - 1);
    ids.emplace(entry, id);
    add_piece(id, bytes_of(entry));
    if (ignore_merges_) whole_words_.emplace(pieces_[static_cast<size_t>(id)], id);
  }
  const std::array<uint32_t, 256> characters = byte_characters();
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string character;
    unicode::append_utf8(characters[byte], &character);
    const auto found = ids.find(character);
    if (found == ids.end()) vocab.fail("has no token for byte " + std::to_string(byte));
    byte_tokens_[byte] = found->second;
  }

  const std::vector<JsonValue> merges = model.at("merges").elements(kMaxTokens);
  merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    std::string left, right;
    if (merges[rank].is_array()) {  // older files write "left right"
      if (merges[rank].array_size() != 2) merges[rank].fail("is no pair");
      left = merges[rank][0].string();
      right = merges[rank][1].string();
    } else {
      const std::string both = merges[rank].string();
      const size_t space = both.find(' ');
      if (space == std::string::npos || space != both.rfind(' ')) merges[rank].fail("is no pair");
      left = both.substr(0, space);
      right = both.substr(space + 1);
    }
    const auto a = ids.find(left), b = ids.find(right), result = ids.find(left + right);
    if (a == ids.end() || b == ids.end() || result == ids.end())
      merges[rank].fail("merges what is not in the vocabulary");
    merges_.insert_or_assign(pair_key(a->second, b->second), Merge{static_cast<int32_t>(rank), result->second});
  }
}

void ByteLevelBpe::read_added(const JsonValue& tokens) {
  for (const JsonValue& token : tokens.elements(kMaxTokens)) {
    for (const char* field : {"single_word", "lstrip", "rstrip"}) {
      if (flag(token, field)) token.at(field).fail("is set, which this runtime does not know");
    }
    AddedToken added{token.at("content").string(), token.at("id").int32(0, kMaxTokens - 1)};
    add_piece(added.id, bytes_of(added.content));
    special_[static_cast<size_t>(added.id)] = flag(token, "special");
    (flag(token, "normalized") ? added_normalized_ : added_).push_back(std::move(added));
  }
  const auto longer = [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); };
  std::stable_sort(added_.begin(), added_.end(), longer);
  std::stable_sort(added_normalized_.begin(), added_normalized_.end(), longer);
}

const ByteLevelBpe::AddedToken* ByteLevelBpe::longest(const std::vector<AddedToken>& tokens, std::string_view text) {
  const auto found = std::find_if(tokens.begin(), tokens.end(),
                                  [&](const AddedToken& token) { return text.starts_with(token.content); });
  return found == tokens.end() ? nullptr : &*found;
}

// Hands on what lies between added tokens, whose ids are appended. `is_text` tells which of those found are none.
template <typename Take, typename IsText>
void ByteLevelBpe::cut(const std::vector<AddedToken>& tokens, std::string_view text, std::vector<int32_t>* out,
                       const IsText& is_text, const Take& take) {
  std::array<bool, 256> begins{};
  for (const AddedToken& token : tokens) begins[static_cast<unsigned char>(token.content[0])] = true;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const AddedToken* token = begins[static_cast<unsigned char>(text[at])] ? longest(tokens, text.substr(at)) : nullptr;
    if (token == nullptr || is_text(*token, text.data() + at)) {
      ++at;
      continue;
    }
    if (at > begin) take(text.substr(begin, at - begin));
    out->push_back(token->id);
    at += token->content.size();
    begin = at;
  }
  if (begin < text.size()) take(text.substr(begin));
}

void ByteLevelBpe::encode(std::string_view text, std::span<const TextRange> plain, std::vector<int32_t>* out) const {
  for (size_t at = 0; at < text.size();) {
    const unicode::Decoded character = unicode::decode_utf8(text, at);
    if (!character.valid) throw Error("the text is not UTF-8 at byte " + std::to_string(at) + ": convert it to UTF-8");
    at += character.size;
  }
  const auto is_text = [&](const AddedToken& token, const char* place) {
    if (!special_[static_cast<size_t>(token.id)]) return false;
    const auto begin = static_cast<size_t>(place - text.data());
    return std::any_of(plain.begin(), plain.end(), [&](const TextRange& range) {
      return begin < range.end && begin + token.content.size() > range.begin;
    });
  };
  cut(added_, text, out, is_text, [&](std::string_view between) {
    cut(added_normalized_, between, out, is_text, [&](std::string_view rest) {
      pre_tokenizer_.split(rest, [&](std::string_view piece) { encode_piece(piece, out); });
    });
  });
}

// The pair of the lowest rank is merged first, of equal ones the leftmost, until no pair has a rank.
void ByteLevelBpe::encode_piece(std::string_view piece, std::vector<int32_t>* out) const {
  if (ignore_merges_) {
    if (const auto whole = whole_words_.find(std::string(piece)); whole != whole_words_.end()) {
      out->push_back(whole->second);
      return;
    }
  }
  struct Symbol {
    int32_t id;
    int32_t previous, next;  // -1 at the ends
  };
  struct Candidate {
    int32_t rank, at;
    int32_t left, right;  // stale once the symbols there are others
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;  // the heap's top is its largest
    }
  };
  if (piece.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    throw Error("the text has a word of " + std::to_string(piece.size()) + " bytes: shorten it");
  const auto count = static_cast<int32_t>(piece.size());
  std::vector<Symbol> symbols(piece.size());
  for (int32_t i = 0; i < count; ++i) {
    const auto byte = static_cast<unsigned char>(piece[static_cast<size_t>(i)]);
    symbols[static_cast<size_t>(i)] = {byte_tokens_[byte], i - 1, i + 1 < count ? i + 1 : -1};
  }
  const auto symbol = [&](int32_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
  std::vector<Candidate> storage;
  storage.reserve(piece.size());
  std::priority_queue<Candidate> heap({}, std::move(storage));
  const auto offer = [&](int32_t left) {
    if (left < 0 || symbol(left).next < 0) return;
    const int32_t a = symbol(left).id, b = symbol(symbol(left).next).id;
    if (const auto merge = merges_.find(pair_key(a, b)); merge != merges_.end())
      heap.push({merge->second.rank, left, a, b});
  };
  for (int32_t i = 0; i < count; ++i) offer(i);
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Symbol& left = symbol(best.at);
    if (left.id != best.left || left.next < 0 || symbol(left.next).id != best.right) continue;
    Symbol& right = symbol(left.next);
    left.id = merges_.find(pair_key(best.left, best.right))->second.result;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbol(left.next).previous = best.at;
    offer(left.previous);
    offer(best.at);
  }
  for (int32_t i = count > 0 ? 0 : -1; i >= 0; i = symbol(i).next) out->push_back(symbol(i).id);
}

std::string_view ByteLevelBpe::bytes(int32_t token, bool skip_special) const {
  const auto at = static_cast<size_t>(token);
  if (token < 0 || at >= pieces_.size() || (skip_special && special_[at])) return {};
  return pieces_[at];
}

std::string TextStream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  size_t at = 0;
  while (at < pending_.size()) {
    const unicode::Decoded character = unicode::decode_utf8(pending_, at);
    if (character.cut_off) break;
    out += character.valid ? pending_.substr(at, character.size) : kReplacement;
    at += character.size;
  }
  pending_.erase(0, at);
  return out;
}

std::string TextStream::flush() { return std::exchange(pending_, {}).empty() ? "" : kReplacement; }

}  // namespace cfmoe
