// JSON on one line, written field by field.
#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

#include "tokenizer/unicode.h"

namespace cfmoe::tools {

// A JSON string; what is no UTF-8 becomes U+FFFD.
inline std::string json_string(std::string_view text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "\"";
  for (size_t at = 0; at < text.size();) {
    const unicode::Decoded character = unicode::decode_utf8(text, at);
    if (!character.valid) {
      out += "\\ufffd";
    } else if (character.point == '"' || character.point == '\\') {
      out += {'\\', static_cast<char>(character.point)};
    } else if (character.point < 32 || character.point == 127) {
      out += {'\\', 'u', '0', '0', kDigits[character.point >> 4], kDigits[character.point & 15]};
    } else {
      out += text.substr(at, character.size);
    }
    at += character.size;
  }
  return out + "\"";
}

class JsonObject {
 public:
  JsonObject& raw(const char* key, const std::string& json) {
    text_ += (text_.empty() ? "\"" : ", \"") + std::string(key) + "\": " + json;
    return *this;
  }
  JsonObject& add(const char* key, std::string_view text) { return raw(key, json_string(text)); }
  JsonObject& add(const char* key, const char* text) { return raw(key, json_string(text)); }
  JsonObject& add(const char* key, bool value) { return raw(key, value ? "true" : "false"); }
  JsonObject& add(const char* key, const JsonObject& object) { return raw(key, object.str()); }
  JsonObject& add(const char* key, double value) {
    char digits[40];
    const auto end = std::to_chars(digits, digits + sizeof(digits), std::isfinite(value) ? value : 0.0);
    return raw(key, std::string(digits, end.ptr));
  }
  template <std::integral Integer>
  JsonObject& add(const char* key, Integer value) {
    return raw(key, std::to_string(value));
  }
  // Appends the other's fields.
  JsonObject& merge(const JsonObject& other) {
    if (!other.text_.empty()) text_ += (text_.empty() ? "" : ", ") + other.text_;
    return *this;
  }
  std::string str() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

}  // namespace cfmoe::tools
