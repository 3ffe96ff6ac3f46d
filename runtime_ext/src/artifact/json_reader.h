// Checked access to JSON that came from a file: every mistake becomes a cfmoe::Error naming the file, the field and the
// reason.
#pragma once

#include <tvm/ffi/any.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace cfmoe {

struct JsonLimits {
  size_t bytes = size_t{64} << 20;  // index.json of 100,000 experts has 2 MiB
  int32_t depth = 64;               // the parser recurses
};

// One value inside a JSON file, with the path that leads to it ("programs.prefill.steps[3].op"). Cheap to copy.
class JsonValue {
 public:
  // `file` is what messages call the text, `remedy` ends them.
  static JsonValue parse(std::string_view text, const std::string& file, const std::string& remedy = "",
                         JsonLimits limits = {});

  bool is_null() const;
  bool is_integer() const;
  bool is_string() const;
  bool is_array() const;
  bool is_object() const;

  // Each throws unless the value is of that type and within the bounds. A number with a fraction or an exponent is no
  // integer.
  int64_t integer(int64_t min, int64_t max) const;
  int32_t int32(int32_t min, int32_t max = std::numeric_limits<int32_t>::max()) const;
  // Not negative, below 2^63.
  uint64_t size_value(uint64_t max = static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) const;
  double number(double min, double max) const;
  bool boolean() const;
  // At least one character unless `allow_empty`; at most 4,096 bytes; no control characters.
  std::string string(bool allow_empty = false) const;
  // Any string of at most `max_bytes`, with whatever characters.
  std::string text(size_t max_bytes) const;
  // A string out of `choices`.
  std::string choice(const std::vector<std::string>& choices) const;
  // A string of 16 lower-case hexadecimal digits.
  uint64_t digest() const;

  // Array: the number of elements, at most `max`.
  size_t array_size(size_t max = std::numeric_limits<int32_t>::max()) const;
  JsonValue operator[](size_t index) const;
  // All elements.
  std::vector<JsonValue> elements(size_t max = std::numeric_limits<int32_t>::max()) const;
  std::vector<int32_t> int32_list(int32_t min, int32_t max, size_t max_size) const;

  // Object.
  JsonValue at(const std::string& key) const;
  std::optional<JsonValue> find(const std::string& key) const;
  // In ascending order, so that errors do not depend on hashing.
  std::vector<std::string> keys() const;

  // "FILE: FIELD: REASON" and the remedy, if one was given to parse.
  [[noreturn]] void fail(const std::string& reason) const;
  const std::string& path() const { return path_; }

 private:
  struct Source {
    std::string file;
    std::string remedy;
  };
  JsonValue(tvm::ffi::Any value, std::shared_ptr<const Source> source, std::string path);

  tvm::ffi::Any value_;
  std::shared_ptr<const Source> source_;
  std::string path_;
};

}  // namespace cfmoe
