// Digests, JSON access, manifest, index and whole artifact directories, valid and damaged.
#include <doctest/doctest.h>

#include "artifact/artifact_files.h"
#include "artifact/checksum.h"
#include "artifact/cpu_features.h"
#include "artifact/json_reader.h"
#include "artifact/relative_path.h"
#include "expect_error.h"
#include "fixtures.h"

using namespace cfmoe;
using namespace cfmoe::test;

TEST_CASE("checksum: published values and text form") {
  // From the xxHash specification's reference implementation: XXH3-64 of nothing, seed 0.
  CHECK(xxh3_64("") == 0x2d06800538d394c2ULL);
  CHECK(format_digest(0x2d06800538d394c2ULL) == "2d06800538d394c2");
  CHECK(format_digest(1) == "0000000000000001");
  uint64_t digest = 0;
  CHECK(parse_digest("2d06800538d394c2", &digest));
  CHECK(digest == 0x2d06800538d394c2ULL);
  for (const char* bad : {"", "2d06800538d394c", "2d06800538d394c20", "2D06800538d394c2", "2d06800538d394cg"}) {
    CHECK(!parse_digest(bad, &digest));
  }
}

TEST_CASE("json: typed access names file, field and reason") {
  JsonValue root = JsonValue::parse(
      R"({"a": {"b": [1, -2, 1e3, "x", true, null, 9223372036854775807]}, "s": "two\nlines"})", "f.json");
  JsonValue list = root.at("a").at("b");
  CHECK(list.array_size() == 7);
  CHECK(list[0].integer(0, 1) == 1);
  CHECK(list[1].int32(-2) == -2);
  CHECK(list[2].number(0, 1e4) == 1000);
  CHECK(list[3].choice({"y", "x"}) == "x");
  CHECK(list[4].boolean());
  CHECK(list[5].is_null());
  CHECK(list[6].size_value() == 9223372036854775807ULL);
  CHECK(root.keys() == std::vector<std::string>{"a", "s"});
  CHECK(!root.find("c"));
  expect_error([&] { list[0].integer(2, 3); }, {"f.json: a.b[0]: 1 is outside 2 to 3"});
  expect_error([&] { list[1].size_value(); }, {"a.b[1]", "-2"});
  expect_error([&] { list[2].integer(0, 9999); }, {"a.b[2]", "expected an integer"});
  expect_error([&] { list[3].boolean(); }, {"a.b[3]", "a string"});
  expect_error([&] { list[4].integer(0, 1); }, {"a boolean"});
  expect_error([&] { list[3].choice({"y", "z"}); }, {"\"x\" is not one of: y, z"});
  expect_error([&] { list[5].string(); }, {"null"});
  expect_error([&] { list[7]; }, {"no element 7"});
  expect_error([&] { list.at("k"); }, {"a list, expected an object"});
  expect_error([&] { root.at("k\n"); }, {"is missing"});
  expect_error([&] { root.at("s").string(); }, {"control character"});
  expect_error([&] { root.at("s").digest(); }, {"control character"});
  expect_error([&] { list.elements(6); }, {"has 7 elements"});
}

TEST_CASE("json: hostile texts") {
  std::string deep(100000, '[');
  expect_error([&] { JsonValue::parse(deep, "f.json"); }, {"f.json", "nested deeper than the 64"});
  expect_error([&] { JsonValue::parse(std::string(80, '[') + std::string(80, ']'), "f.json"); }, {"nested deeper"});
  CHECK(JsonValue::parse("\"" + deep + "\"", "f.json").is_string());
  CHECK(JsonValue::parse("{\"a\\\"[\": 1}", "f.json").is_object());
  expect_error([] { JsonValue::parse("[1, 2", "f.json", "write it again"); }, {"not valid JSON", "write it again"});
  expect_error([] { JsonValue::parse("", "f.json"); }, {"not valid JSON"});
  expect_error([] { JsonValue::parse("\"\\", "f.json"); }, {"not valid JSON"});
  expect_error([] { JsonValue::parse("\"\\u12", "f.json"); }, {"not valid JSON"});
  expect_error([] { JsonValue::parse(std::string_view("[1\0]", 4), "f.json"); }, {"zero byte"});
  expect_error([] { JsonValue::parse("[1, 2, 3]", "f.json", "", JsonLimits{4, 64}); }, {"9 bytes"});
  expect_error([] { JsonValue::parse("[NaN]", "f.json")[0].number(0, 1); }, {"outside"});
  expect_error([] { JsonValue::parse("[1e999]", "f.json")[0].number(0, 1); }, {});
  expect_error([] { JsonValue::parse("[9223372036854775808]", "f.json")[0].size_value(); }, {"expected an integer"});
}

TEST_CASE("paths inside an artifact") {
  for (const char* good : {"a", "lib/x/kernels.so", "..a", "a..b"}) CHECK(is_inside_artifact(good));
  for (const char* bad : {"", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a/..", "C:a", "a\\b", "a\nb"})
    CHECK(!is_inside_artifact(bad));
}

TEST_CASE("manifest: a valid one") {
  Manifest manifest = parse_manifest(manifest_text(artifact_contents()), "manifest.json");
  CHECK(manifest.model.family == "qwen3_moe");
  CHECK(manifest.model.moe_layers == std::vector<int32_t>{1, 2});
  CHECK(manifest.model.router_renormalise);
  CHECK(manifest.model.eos_token_ids == std::vector<int32_t>{0, 99});
  CHECK(manifest.prefill_chunk == 16);
  CHECK(manifest.targets.size() == 1);
  CHECK(manifest.targets[0].library == "lib/host/kernels.so");
  CHECK(manifest.files.at("weights.bin").size == 4096);
  CHECK(manifest.tokenizer_files == std::vector<std::string>{"tokenizer.json"});
}

TEST_CASE("manifest: seal, version and hostile values") {
  std::string text = manifest_text(artifact_contents());
  auto parse = [](const std::string& changed) { return [changed] { parse_manifest(changed, "d/manifest.json"); }; };
  expect_error(parse(replaced(text, "\"top_k\": 2", "\"top_k\": 3")),
               {"d/manifest.json", "changed after it was written", "cfmoe compile"});
  for (size_t length : {size_t{0}, size_t{1}, size_t{40}, text.size() / 2, text.size() - 1}) {
    expect_error(parse(text.substr(0, length)), {"d/manifest.json", "cfmoe compile"});
  }
  expect_error(parse(text + "\n"), {"d/manifest.json"});
  std::string other = replaced(text, "\"format_version\": 1", "\"format_version\": 2");
  for (const std::string& each : {other, seal(other)}) {
    expect_error(parse(each), {"d/manifest.json", "format_version", "version 2", "reads version 1",
                               "compile it again with cfmoe compile"});
  }
  struct Change {
    const char *from, *to, *field;
  };
  for (const Change& change : {
           Change{"cfmoe-artifact", "other", "format"},
           Change{"\"num_layers\": 3", "\"num_layers\": 0", "model.num_layers"},
           Change{"\"num_layers\": 3", "\"num_layers\": 2", "model.moe_layers[1]"},
           Change{"\"num_layers\": 3", "\"num_layers\": \"3\"", "model.num_layers"},
           Change{"\"num_layers\": 3", "\"layers\": 3", "num_layers"},
           Change{"\"hidden_size\": 64", "\"hidden_size\": 99999999999", "model.hidden_size"},
           Change{"\"num_kv_heads\": 2", "\"num_kv_heads\": 3", "model.num_kv_heads"},
           Change{"[1, 2]", "[2, 1]", "model.moe_layers"},
           Change{"[1, 2]", "[]", "model.moe_layers"},
           Change{"\"top_k\": 2", "\"top_k\": 4", "model.top_k"},
           Change{"softmax", "hard", "model.router.score"},
           Change{"\"scale\": 1.0", "\"scale\": NaN", "model.router.scale"},
           Change{"[0, 99]", "[0, 100]", "model.eos_token_ids[1]"},
           Change{"\"bos_token_id\": null", "\"bos_token_id\": -1", "model.bos_token_id"},
           Change{"\"prefill_chunk\": 16", "\"prefill_chunk\": -16", "prefill_chunk"},
           Change{"\"kv_dtype\": \"float16\"", "\"kv_dtype\": \"int4\"", "kv_dtype"},
           Change{"\"library\": \"lib/host/kernels.so\"", "\"library\": \"../kernels.so\"", "targets.host.library"},
           Change{"\"library\": \"lib/host/kernels.so\"", "\"library\": \"/lib/libc.so\"", "targets.host.library"},
           Change{"\"plan\": \"lib/host/plan.json\"", "\"plan\": \"lib/plan.json\"", "targets.host.plan"},
           Change{"[\"tokenizer.json\"]", "[\"../../etc/passwd\"]", "tokenizer_files[0]"},
           Change{"\"weights.bin\":", "\"/weights.bin\":", "files"},
           Change{"\"weights.bin\":", "\"weight.bin\":", "weights.bin"},
           Change{"\"size\": 4096", "\"size\": -1", "files.weights.bin.size"},
       }) {
    INFO(change.to);
    expect_error(parse(seal(replaced(text, change.from, change.to))),
                 {"d/manifest.json", change.field, "cfmoe compile"});
  }
}

TEST_CASE("index: a valid one and hostile values") {
  std::string text = index_text();
  uint64_t experts_size = kStride * kLayers * kExperts;
  ArtifactIndex index = parse_index(text, "index.json", 4096, experts_size);
  CHECK(index.weights.size() == 2);
  CHECK(index.weights[1].offset == 1024);
  CHECK(index.weights[1].shape == std::vector<int64_t>{96});
  CHECK(index.experts.digests == expert_index().digests);
  CHECK(index.experts.down_offset == 12800);
  expect_error([&] { parse_index(text, "d/index.json", 4096, experts_size - 1); }, {"d/index.json", "experts.bin"});
  expect_error([&] { parse_index(text, "d/index.json", 1024, experts_size); }, {"weights.bin", "4096"});
  struct Change {
    const char *from, *to, *field;
  };
  for (const Change& change : {
           Change{"\"version\": 1", "\"version\": 2", "version"},
           Change{"\"offset\": 1024", "\"offset\": 1025", "weights[1].offset"},
           Change{"\"offset\": 1024", "\"offset\": 4097", "weights[1].offset"},
           Change{"\"offset\": 1024", "\"offset\": 4032", "weights[1].size"},
           Change{"\"size\": 1024", "\"size\": 9223372036854775807", "weights[0].size"},
           Change{"[16, 16]", "[16, 15]", "weights[0].shape"},
           Change{"[16, 16]", "[1099511627776, 1099511627776]", "weights[0].shape"},
           Change{"[16, 16]", "[-1, -256]", "weights[0].shape[0]"},
           Change{"\"norm\"", "\"embedding\"", "weights[1]"},
           Change{"float16", "float8", "weights[1].dtype"},
           Change{"\"layers\": 2", "\"layers\": 1", "experts"},
           Change{"\"layers\": 2", "\"layers\": 100000", "experts.layers"},
           Change{"\"record_bytes\": 20000", "\"record_bytes\": 32769", "experts.record_bytes"},
           Change{"\"record_bytes\": 20000", "\"record_bytes\": 16000", "experts.record_stride"},
           Change{"\"record_stride\": 32768", "\"record_stride\": 32767", "experts.record_stride"},
           Change{"\"record_stride\": 32768", "\"record_stride\": 0", "experts.record_stride"},
           Change{"\"alignment\": 16384", "\"alignment\": 4096", "experts.alignment"},
           Change{"\"offset\": 12800", "\"offset\": 12864", "experts.sections.down.size"},
           Change{"\"offset\": 12800", "\"offset\": 6400", "experts.sections"},
           Change{"[[\"", "[[\"x", "experts.xxh3_64[0][0]"},
           Change{"\"xxh3_64\": [[", "\"xxh3_64\": [[], [", "experts.xxh3_64"},
       }) {
    INFO(change.to);
    expect_error([&] { parse_index(replaced(text, change.from, change.to), "d/index.json", 4096, experts_size); },
                 {"d/index.json", change.field, "cfmoe compile"});
  }
}

TEST_CASE("targets: the fullest that runs here, else what is missing") {
  Manifest manifest;
  auto add = [&](const char* name, const char* device, const char* arch, std::vector<std::string> features) {
    manifest.targets.push_back(TargetEntry{name, device, arch, std::move(features), "k", "l", "p"});
  };
  add("base", "cpu", "x86_64", {});
  add("avx2", "cpu", "x86_64", {"avx2", "fma"});
  add("vnni", "cpu", "x86_64", {"avx2", "fma", "avx512vnni"});
  add("arm", "cpu", "aarch64", {"dotprod"});
  add("arm i8mm", "cpu", "aarch64", {"dotprod", "i8mm"});
  add("gpu", "vulkan", "x86_64", {});
  CHECK(pick_cpu_target(manifest, "m", CpuFacts{"x86_64", {"avx2", "fma"}}).name == "avx2");
  CHECK(pick_cpu_target(manifest, "m", CpuFacts{"x86_64", {"avx2", "fma", "avx512vnni"}}).name == "vnni");
  CHECK(pick_cpu_target(manifest, "m", CpuFacts{"x86_64", {}}).name == "base");
  CHECK(pick_cpu_target(manifest, "m", CpuFacts{"aarch64", {"neon", "dotprod"}}).name == "arm");
  CHECK(pick_cpu_target(manifest, "m", CpuFacts{"aarch64", {"neon", "dotprod", "i8mm"}}).name == "arm i8mm");
  expect_error(
      [&] { pick_cpu_target(manifest, "m", CpuFacts{"aarch64", {"neon"}}); },
      {"m: ", "arm needs dotprod", "arm i8mm needs dotprod, i8mm", "base needs an x86_64 CPU", "compile the model"});
}

TEST_CASE("artifact directories, valid and damaged") {
  TempDir dir;
  write_artifact(dir.path());
  Artifact artifact = open_artifact(dir.path());
  CHECK(cpu_target(artifact).name == "host");
  CHECK(artifact.index.experts.experts == 3);
  CHECK(read_verified(dir.path(), artifact.manifest, "tokenizer.json") == "{\"a\": 1}");
  expect_error([&] { read_verified(dir.path(), artifact.manifest, "../x"); }, {"../x", "does not list"});

  expect_error([&] { open_artifact(dir / "nowhere"); }, {"nowhere", "not a directory"});
  expect_error([&] { open_artifact(dir / "lib"); }, {"lib", "no manifest.json"});
  const auto open = [&dir] { cpu_target(open_artifact(dir.path())); };
  for (const char* name : {"index.json", "weights.bin", "experts.bin", "lib/host/kernels.so", "lib/host/plan.json"}) {
    INFO(name);
    std::string bytes = read_file(dir / name);
    std::filesystem::remove(dir / name);
    expect_error(open, {name, "missing", "cfmoe compile"});
    write_file(dir / name, bytes.substr(0, bytes.size() - 1));
    expect_error(open, {name, std::to_string(bytes.size() - 1), "cfmoe compile"});
    write_file(dir / name, bytes);
  }
  flip_bit(dir / "index.json", 40);
  expect_error([&] { open_artifact(dir.path()); }, {"index.json", "damaged", "digest", "cfmoe compile"});
  flip_bit(dir / "index.json", 40);
  flip_bit(dir / "lib/host/plan.json", 1);
  expect_error([&] { read_verified(dir.path(), artifact.manifest, "lib/host/plan.json"); }, {"plan.json", "damaged"});
  write_file(dir / "manifest.json", manifest_text(artifact_contents(), host_cpu().arch, "[\"quantum\"]"));
  expect_error(open, {"manifest.json", "host needs quantum", "--target"});
  std::string other = replaced(manifest_text(artifact_contents()), "\"num_experts\": 3", "\"num_experts\": 4");
  write_file(dir / "manifest.json", seal(other));
  expect_error([&] { open_artifact(dir.path()); }, {"index.json", "2 layers of 3 experts", "2 of 4"});
}
