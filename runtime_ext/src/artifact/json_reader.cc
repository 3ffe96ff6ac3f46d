// Checked access to JSON, on tvm-ffi's parser.
#include "artifact/json_reader.h"

#include <tvm/ffi/extra/json.h>

#include <algorithm>
#include <utility>

#include "artifact/checksum.h"
#include "error.h"

namespace cfmoe {
namespace {

namespace ffi = tvm::ffi;

constexpr size_t kMaxStringBytes = 4096;

std::string describe(const ffi::Any& value) {
  if (value.type_index() == ffi::TypeIndex::kTVMFFINone) return "null";
  if (auto number = value.as<int64_t>(); value.type_index() == ffi::TypeIndex::kTVMFFIInt)
    return std::to_string(*number);
  if (value.type_index() == ffi::TypeIndex::kTVMFFIBool) return "a boolean";
  if (value.type_index() == ffi::TypeIndex::kTVMFFIFloat) return "the number " + std::to_string(value.cast<double>());
  if (value.as<ffi::String>()) return "a string";
  if (value.as<ffi::json::Array>()) return "a list";
  if (value.as<ffi::json::Object>()) return "an object";
  return "of an unknown type";
}

// Shown text comes from a file: one line, printable, short.
std::string shown(std::string_view text) {
  std::string out;
  for (char c : text.substr(0, 60)) out.push_back(static_cast<unsigned char>(c) < 32 || c == 127 ? '?' : c);
  return "\"" + out + (text.size() > 60 ? "…\"" : "\"");
}

int32_t nesting_depth(std::string_view text) {
  int32_t depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (in_string) {
      if (c == '\\') {
        ++i;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

}  // namespace

JsonValue::JsonValue(ffi::Any value, std::shared_ptr<const Source> source, std::string path)
    : value_(std::move(value)), source_(std::move(source)), path_(std::move(path)) {}

JsonValue JsonValue::parse(std::string_view text, const std::string& file, const std::string& remedy,
                           JsonLimits limits) {
  JsonValue root(ffi::Any(), std::make_shared<const Source>(Source{file, remedy}), "");
  if (text.size() > limits.bytes) {
    root.fail("has " + std::to_string(text.size()) + " bytes, more than the " + std::to_string(limits.bytes) +
              " that are read");
  }
  if (text.find('\0') != std::string_view::npos) root.fail("not valid JSON: it contains a zero byte");
  if (nesting_depth(text) > limits.depth) {
    root.fail("nested deeper than the " + std::to_string(limits.depth) + " levels that are read");
  }
  ffi::String message;
  try {
    root.value_ = ffi::json::Parse(ffi::String(text.data(), text.size()), &message);
  } catch (const std::exception& error) {
    root.fail(std::string("not valid JSON: ") + shown(error.what()));
  }
  if (!message.empty()) root.fail("not valid JSON: " + std::string(message));
  return root;
}

void JsonValue::fail(const std::string& reason) const {
  std::string message = source_->file + ": " + (path_.empty() ? "" : path_ + ": ") + reason;
  if (!source_->remedy.empty()) message += "; " + source_->remedy;
  throw Error(message);
}

bool JsonValue::is_null() const { return value_.type_index() == ffi::TypeIndex::kTVMFFINone; }
bool JsonValue::is_integer() const { return value_.type_index() == ffi::TypeIndex::kTVMFFIInt; }
bool JsonValue::is_string() const { return value_.as<ffi::String>().has_value(); }
bool JsonValue::is_array() const { return value_.as<ffi::json::Array>().has_value(); }
bool JsonValue::is_object() const { return value_.as<ffi::json::Object>().has_value(); }

int64_t JsonValue::integer(int64_t min, int64_t max) const {
  if (!is_integer()) fail("is " + describe(value_) + ", expected an integer");
  int64_t value = value_.cast<int64_t>();
  if (value < min || value > max) {
    fail(std::to_string(value) + " is outside " + std::to_string(min) + " to " + std::to_string(max));
  }
  return value;
}

int32_t JsonValue::int32(int32_t min, int32_t max) const { return static_cast<int32_t>(integer(min, max)); }

uint64_t JsonValue::size_value(uint64_t max) const {
  constexpr auto kLargest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  return static_cast<uint64_t>(integer(0, static_cast<int64_t>(std::min(max, kLargest))));
}

double JsonValue::number(double min, double max) const {
  double value = 0;
  if (is_integer()) {
    value = static_cast<double>(value_.cast<int64_t>());
  } else if (value_.type_index() == ffi::TypeIndex::kTVMFFIFloat) {
    value = value_.cast<double>();
  } else {
    fail("is " + describe(value_) + ", expected a number");
  }
  if (!(value >= min && value <= max)) {
    fail(std::to_string(value) + " is outside " + std::to_string(min) + " to " + std::to_string(max));
  }
  return value;
}

bool JsonValue::boolean() const {
  if (value_.type_index() != ffi::TypeIndex::kTVMFFIBool) fail("is " + describe(value_) + ", expected true or false");
  return value_.cast<bool>();
}

std::string JsonValue::string(bool allow_empty) const {
  auto value = value_.as<ffi::String>();
  if (!value) fail("is " + describe(value_) + ", expected a string");
  std::string text(value->data(), value->size());
  if (text.empty() && !allow_empty) fail("is an empty string");
  if (text.size() > kMaxStringBytes) fail("is a string of more than " + std::to_string(kMaxStringBytes) + " bytes");
  if (std::any_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 32 || c == 127; })) {
    fail("contains a control character");
  }
  return text;
}

std::string JsonValue::text(size_t max_bytes) const {
  auto value = value_.as<ffi::String>();
  if (!value) fail("is " + describe(value_) + ", expected a string");
  if (value->size() > max_bytes) fail("is a string of more than " + std::to_string(max_bytes) + " bytes");
  return {value->data(), value->size()};
}

std::string JsonValue::choice(const std::vector<std::string>& choices) const {
  std::string text = string();
  if (std::find(choices.begin(), choices.end(), text) != choices.end()) return text;
  std::string list;
  for (const std::string& choice : choices) list += (list.empty() ? "" : ", ") + choice;
  fail(shown(text) + " is not one of: " + list);
}

uint64_t JsonValue::digest() const {
  std::string text = string();
  uint64_t value = 0;
  if (!parse_digest(text, &value)) fail(shown(text) + " is not a digest of 16 lower-case hexadecimal digits");
  return value;
}

size_t JsonValue::array_size(size_t max) const {
  auto array = value_.as<ffi::json::Array>();
  if (!array) fail("is " + describe(value_) + ", expected a list");
  if (array->size() > max)
    fail("has " + std::to_string(array->size()) + " elements, at most " + std::to_string(max) + " are read");
  return array->size();
}

JsonValue JsonValue::operator[](size_t index) const {
  size_t size = array_size();
  if (index >= size) fail("has no element " + std::to_string(index));
  return JsonValue(value_.cast<ffi::json::Array>()[static_cast<int64_t>(index)], source_,
                   path_ + "[" + std::to_string(index) + "]");
}

std::vector<JsonValue> JsonValue::elements(size_t max) const {
  std::vector<JsonValue> out;
  size_t size = array_size(max);
  out.reserve(size);
  auto array = value_.cast<ffi::json::Array>();
  for (size_t i = 0; i < size; ++i) {
    out.push_back(JsonValue(array[static_cast<int64_t>(i)], source_, path_ + "[" + std::to_string(i) + "]"));
  }
  return out;
}

std::vector<int32_t> JsonValue::int32_list(int32_t min, int32_t max, size_t max_size) const {
  std::vector<int32_t> out;
  for (const JsonValue& element : elements(max_size)) out.push_back(element.int32(min, max));
  return out;
}

JsonValue JsonValue::at(const std::string& key) const {
  std::optional<JsonValue> value = find(key);
  if (!value) fail("the field " + shown(key) + " is missing");
  return *value;
}

std::optional<JsonValue> JsonValue::find(const std::string& key) const {
  auto object = value_.as<ffi::json::Object>();
  if (!object) fail("is " + describe(value_) + ", expected an object");
  auto it = object->find(ffi::String(key));
  if (it == object->end()) return std::nullopt;
  return JsonValue((*it).second, source_, path_.empty() ? key : path_ + "." + key);
}

std::vector<std::string> JsonValue::keys() const {
  auto object = value_.as<ffi::json::Object>();
  if (!object) fail("is " + describe(value_) + ", expected an object");
  std::vector<std::string> out;
  for (const auto& [key, value] : *object) {
    auto name = key.cast<ffi::String>();
    out.emplace_back(name.data(), name.size());
    if (std::any_of(out.back().begin(), out.back().end(), [](char c) { return static_cast<unsigned char>(c) < 32; })) {
      fail("has a field name with a control character");
    }
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace cfmoe
