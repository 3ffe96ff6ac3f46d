// Parses index.json and bounds every number before anything is read or allocated by it.
#include "artifact/index.h"

#include <optional>
#include <set>

#include "artifact/json_reader.h"

namespace cfmoe {
namespace {

constexpr char kRemedy[] = "compile the artifact again with cfmoe compile";
constexpr uint64_t kTensorAlignment = 64, kRecordAlignment = 16384, kWeightsPadding = 4096;
constexpr uint64_t kMaxRecord = uint64_t{1} << 32;  // 32-bit word offsets reach 8 GiB
constexpr size_t kMaxTensors = 1 << 20, kMaxRank = 8;

uint64_t dtype_bytes(const JsonValue& value, const std::string& dtype) {
  if (dtype == "int32" || dtype == "float32") return 4;
  if (dtype == "float16") return 2;
  if (dtype == "int8" || dtype == "uint8") return 1;
  value.fail("\"" + dtype + "\" is not one of: int32, float32, float16, int8, uint8");
}

TensorEntry parse_tensor(const JsonValue& value, uint64_t weights_size) {
  TensorEntry tensor;
  tensor.name = value.at("name").string();
  tensor.offset = value.at("offset").size_value(weights_size);
  tensor.size = value.at("size").size_value(weights_size - tensor.offset);
  tensor.dtype = value.at("dtype").string();
  tensor.xxh3_64 = value.at("xxh3_64").digest();
  if (tensor.offset % kTensorAlignment != 0) value.at("offset").fail("is not a multiple of 64");
  uint64_t bytes = dtype_bytes(value.at("dtype"), tensor.dtype);
  JsonValue shape = value.at("shape");
  for (const JsonValue& dimension : shape.elements(kMaxRank)) {
    tensor.shape.push_back(dimension.integer(1, int64_t{1} << 40));
    auto extent = static_cast<uint64_t>(tensor.shape.back());
    if (bytes > tensor.size / extent) shape.fail("is larger than size " + std::to_string(tensor.size));
    bytes *= extent;
  }
  if (bytes != tensor.size) {
    shape.fail("has " + std::to_string(bytes) + " bytes, but size is " + std::to_string(tensor.size));
  }
  return tensor;
}

void parse_section(const JsonValue& value, uint64_t record_bytes, uint64_t* offset, uint64_t* size) {
  *offset = value.at("offset").size_value(record_bytes);
  *size = value.at("size").size_value(record_bytes - *offset);
  if (*offset % kTensorAlignment != 0) value.at("offset").fail("is not a multiple of 64");
  if (*size == 0 || *size % 4 != 0) value.at("size").fail("is not a positive multiple of 4");
}

ExpertIndex parse_experts(const JsonValue& value, uint64_t experts_size) {
  ExpertIndex index;
  index.format = value.at("format").choice({"q4", "q8", "f16", "f32"});
  index.layers = value.at("layers").int32(1, 1024);
  index.experts = value.at("experts").int32(1, 1 << 14);
  index.record_bytes = value.at("record_bytes").size_value(kMaxRecord);
  index.record_stride = value.at("record_stride").size_value(kMaxRecord);
  if (index.record_bytes == 0 || index.record_bytes % 4 != 0)
    value.at("record_bytes").fail("is not a positive multiple of 4");
  if (index.record_stride % kRecordAlignment != 0) value.at("record_stride").fail("is not a multiple of 16384");
  if (index.record_stride < index.record_bytes || index.record_stride - index.record_bytes >= kRecordAlignment) {
    value.at("record_stride").fail("is not record_bytes rounded up to 16384");
  }
  value.at("alignment").integer(kRecordAlignment, kRecordAlignment);
  JsonValue sections = value.at("sections");
  parse_section(sections.at("gate_up"), index.record_bytes, &index.gate_up_offset, &index.gate_up_size);
  parse_section(sections.at("down"), index.record_bytes, &index.down_offset, &index.down_size);
  bool apart = index.gate_up_offset + index.gate_up_size <= index.down_offset ||
               index.down_offset + index.down_size <= index.gate_up_offset;
  if (!apart) sections.fail("gate_up and down overlap");

  uint64_t records = static_cast<uint64_t>(index.layers) * static_cast<uint64_t>(index.experts);
  if (records * index.record_stride != experts_size) {
    value.fail(std::to_string(records) + " records of " + std::to_string(index.record_stride) +
               " bytes do not make the size of experts.bin, " + std::to_string(experts_size));
  }
  JsonValue digests = value.at("xxh3_64");
  std::vector<JsonValue> rows = digests.elements(static_cast<size_t>(index.layers));
  if (rows.size() != static_cast<size_t>(index.layers)) digests.fail("has not one list for each layer");
  index.digests.reserve(records);
  for (const JsonValue& row : rows) {
    std::vector<JsonValue> entries = row.elements(static_cast<size_t>(index.experts));
    if (entries.size() != static_cast<size_t>(index.experts)) row.fail("has not one digest for each expert");
    for (const JsonValue& entry : entries) index.digests.push_back(entry.digest());
  }
  return index;
}

}  // namespace

ArtifactIndex parse_index(std::string_view text, const std::string& path, uint64_t weights_size,
                          uint64_t experts_size) {
  JsonValue root = JsonValue::parse(text, path, kRemedy);
  root.at("version").integer(1, 1);
  ArtifactIndex index;
  JsonValue weights = root.at("weights");
  if (weights_size % kWeightsPadding != 0) {
    weights.fail("weights.bin has " + std::to_string(weights_size) + " bytes, not a multiple of 4096");
  }
  std::set<std::string> names;
  for (const JsonValue& entry : weights.elements(kMaxTensors)) {
    index.weights.push_back(parse_tensor(entry, weights_size));
    if (!names.insert(index.weights.back().name).second)
      entry.fail("the name \"" + index.weights.back().name + "\" appears twice");
  }
  index.experts = parse_experts(root.at("experts"), experts_size);
  return index;
}

}  // namespace cfmoe
