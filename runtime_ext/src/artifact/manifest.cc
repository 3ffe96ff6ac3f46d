// Parses manifest.json: seal, version, then every field with its bounds.
#include "artifact/manifest.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "artifact/checksum.h"
#include "artifact/json_reader.h"
#include "artifact/relative_path.h"
#include "error.h"

namespace cfmoe {
namespace {

constexpr char kRemedy[] = "compile it again with cfmoe compile";
constexpr std::string_view kSealPrefix = ",\n  \"xxh3_64\": \"";
constexpr std::string_view kSealSuffix = "\"\n}\n";
constexpr size_t kDigestSize = 16;
constexpr size_t kSealSize = kSealPrefix.size() + kDigestSize + kSealSuffix.size();

// Wide enough for any model of this decade, and small enough that products of a few of them stay below 2^63.
constexpr int32_t kMaxLayers = 1024, kMaxHidden = 1 << 16, kMaxVocabulary = 1 << 24, kMaxContext = 1 << 24;
constexpr int32_t kMaxHeads = 1024, kMaxHeadDim = 4096, kMaxExperts = 1 << 14, kMaxTopK = 256, kMaxChunk = 1 << 16;
constexpr size_t kMaxFiles = 10000, kMaxTargets = 64, kMaxFeatures = 64, kMaxEndTokens = 1024;

bool is_sealed(std::string_view text) {
  if (text.size() < kSealSize) return false;
  std::string_view body = text.substr(0, text.size() - kSealSize);
  std::string_view seal = text.substr(body.size());
  uint64_t digest = 0;
  return seal.starts_with(kSealPrefix) && seal.ends_with(kSealSuffix) &&
         parse_digest(seal.substr(kSealPrefix.size(), kDigestSize), &digest) && digest == xxh3_64(body);
}

void check_version(const JsonValue& root) {
  JsonValue format = root.at("format");
  if (format.string() != "cfmoe-artifact") format.fail("\"" + format.string() + "\" is not \"cfmoe-artifact\"");
  JsonValue version = root.at("format_version");
  int64_t number = version.integer(0, std::numeric_limits<int32_t>::max());
  if (number != kFormatVersion) {
    version.fail("the artifact has format version " + std::to_string(number) + ", this runtime reads version " +
                 std::to_string(kFormatVersion));
  }
}

// A manifest of another version may be sealed in another way, so a broken seal is reported only where the version is
// ours.
void check_seal(std::string_view text, const std::string& path) {
  if (is_sealed(text)) return;
  std::optional<JsonValue> root;
  try {
    root = JsonValue::parse(text, path, kRemedy);
  } catch (const Error&) {
    throw Error(path + ": the file is damaged or cut short (its own digest differs); copy the artifact again or " +
                kRemedy);
  }
  check_version(*root);
  throw Error(path +
              ": the file was changed after it was written (its own digest differs); copy the artifact again or " +
              kRemedy);
}

std::string inside_path(const JsonValue& value) {
  std::string path = value.string();
  if (!is_inside_artifact(path)) value.fail("\"" + path + "\" does not stay inside the artifact");
  return path;
}

std::string listed_path(const JsonValue& value, const Manifest& manifest) {
  std::string path = inside_path(value);
  if (!manifest.files.contains(path)) value.fail("\"" + path + "\" is not listed in files");
  return path;
}

std::vector<int32_t> parse_moe_layers(const JsonValue& value, int32_t num_layers) {
  std::vector<int32_t> layers = value.int32_list(0, num_layers - 1, static_cast<size_t>(num_layers));
  if (layers.empty()) value.fail("is empty: a model without MoE layers is not for this runtime");
  for (size_t i = 1; i < layers.size(); ++i) {
    if (layers[i] <= layers[i - 1]) value.fail("is not in ascending order");
  }
  return layers;
}

ModelFacts parse_model(const JsonValue& value) {
  ModelFacts model;
  model.family = value.at("family").string();
  model.name = value.at("name").string();
  model.num_layers = value.at("num_layers").int32(1, kMaxLayers);
  model.hidden_size = value.at("hidden_size").int32(1, kMaxHidden);
  model.vocab_size = value.at("vocab_size").int32(1, kMaxVocabulary);
  model.context_size = value.at("context_size").int32(1, kMaxContext);
  model.num_heads = value.at("num_heads").int32(1, kMaxHeads);
  model.num_kv_heads = value.at("num_kv_heads").int32(1, model.num_heads);
  if (model.num_heads % model.num_kv_heads != 0) {
    value.at("num_kv_heads").fail("does not divide num_heads " + std::to_string(model.num_heads));
  }
  model.head_dim = value.at("head_dim").int32(1, kMaxHeadDim);
  model.moe_layers = parse_moe_layers(value.at("moe_layers"), model.num_layers);
  model.num_experts = value.at("num_experts").int32(1, kMaxExperts);
  model.top_k = value.at("top_k").int32(1, std::min(model.num_experts, kMaxTopK));
  model.expert_ffn_size = value.at("expert_ffn_size").int32(1, 1 << 20);
  JsonValue router = value.at("router");
  model.router_score = router.at("score").choice({"softmax", "sigmoid"});
  model.router_renormalise = router.at("renormalise").boolean();
  model.router_scale = router.at("scale").number(1e-6, 1e6);
  if (std::optional<JsonValue> bos = value.find("bos_token_id"); bos && !bos->is_null())
    bos->int32(0, model.vocab_size - 1);
  model.eos_token_ids = value.at("eos_token_ids").int32_list(0, model.vocab_size - 1, kMaxEndTokens);
  return model;
}

std::map<std::string, FileEntry> parse_files(const JsonValue& value) {
  std::map<std::string, FileEntry> files;
  std::vector<std::string> names = value.keys();
  if (names.size() > kMaxFiles) value.fail("has " + std::to_string(names.size()) + " entries");
  for (const std::string& name : names) {
    JsonValue entry = value.at(name);
    if (!is_inside_artifact(name)) entry.fail("the path does not stay inside the artifact");
    files[name] = FileEntry{entry.at("size").size_value(), entry.at("xxh3_64").digest()};
  }
  for (const char* name : {"index.json", "weights.bin", "experts.bin"}) {
    if (!files.contains(name)) value.fail(std::string("\"") + name + "\" is missing");
  }
  return files;
}

std::vector<TargetEntry> parse_targets(const JsonValue& value, const Manifest& manifest) {
  std::vector<TargetEntry> targets;
  std::vector<std::string> names = value.keys();
  if (names.empty() || names.size() > kMaxTargets) value.fail("has " + std::to_string(names.size()) + " entries");
  for (const std::string& name : names) {
    JsonValue entry = value.at(name);
    TargetEntry target;
    target.name = name;
    target.device = entry.at("device").choice({"cpu", "vulkan", "opencl", "metal"});
    const bool cpu = target.device == "cpu";
    target.arch = entry.at("arch").choice(cpu ? std::vector<std::string>{"x86_64", "aarch64"}
                                              : std::vector<std::string>{"generic"});
    for (const JsonValue& feature : entry.at("features").elements(kMaxFeatures))
      target.features.push_back(feature.string());
    const std::optional<JsonValue> own = entry.find("kernel_set");
    target.kernel_set = own ? own->string() : manifest.kernel_set;
    target.library = listed_path(entry.at("library"), manifest);
    target.plan = listed_path(entry.at("plan"), manifest);
    targets.push_back(std::move(target));
  }
  return targets;
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& path) {
  check_seal(text, path);
  JsonValue root = JsonValue::parse(text, path, kRemedy);
  check_version(root);
  Manifest manifest;
  manifest.model = parse_model(root.at("model"));
  manifest.prefill_chunk = root.at("prefill_chunk").int32(1, kMaxChunk);
  manifest.kv_dtype = root.at("kv_dtype").choice({"float16", "float32"});
  manifest.kernel_set = root.at("kernel_set").string();
  manifest.files = parse_files(root.at("files"));
  manifest.targets = parse_targets(root.at("targets"), manifest);
  for (const JsonValue& name : root.at("tokenizer_files").elements(kMaxFiles)) {
    manifest.tokenizer_files.push_back(listed_path(name, manifest));
  }
  return manifest;
}

}  // namespace cfmoe
