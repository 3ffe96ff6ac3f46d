// The plan's reader: a valid plan, expressions, and what it refuses.
#include "engine/plan.h"

#include <doctest/doctest.h>

#include <string>

#include "expect_error.h"
#include "fixtures.h"
#include "plan_fixture.h"

namespace cfmoe {
namespace {

Manifest manifest() { return parse_manifest(test::manifest_text(test::artifact_contents()), "manifest.json"); }

ArtifactIndex index() {
  return parse_index(test::index_text(), "index.json", test::weights_file().size(), test::experts_file().size());
}

Plan parse(const std::string& text) { return parse_plan(text, "plan.json", manifest(), index()); }

void refused(const std::string& from, const std::string& to, const std::vector<std::string>& parts) {
  INFO("replacing ", from, " by ", to);
  std::vector<std::string> all = {"plan.json"};
  all.insert(all.end(), parts.begin(), parts.end());
  test::expect_error([&] { parse(test::replaced(test::plan_text(), from, to)); }, all);
}

Expression expression(const std::string& text) {
  const SymbolBounds bounds{{1, 16}, {0, 128}, {16, 128}};
  return Expression::parse(JsonValue::parse(text, "expression"), bounds);
}

}  // namespace

TEST_CASE("a valid plan is read whole") {
  const Plan plan = parse(test::plan_text());
  CHECK(plan.bounds.n.high == 16);
  CHECK(plan.kv.layers == 3);
  CHECK(tensor_bytes(plan.kv.dtype, plan.kv.k_shape, {1, 0, 64}) == 2 * 4 * 16 * 16 * 2);
  CHECK(plan.experts.down.tiles == 2);
  CHECK(plan.prefill.buffers.size() == 13);
  CHECK(plan.prefill.buffers[11].layer == 1);
  CHECK(plan.prefill.steps.size() == 11);
  CHECK(plan.prefill.steps[1].arguments[3].scalar.evaluate({5, 20, 64}) == 20);
  CHECK(plan.prefill.steps[4].scratch == 8);
  CHECK(plan.decode.output == 2);
  CHECK(plan.head.steps[0].kernel == "head");
}

TEST_CASE("groups of experts") {
  const std::string route = R"("op": "route", )", grouped = route + R"("groups": 3, "top_groups": 2, )";
  const Plan plan = parse(test::replaced(test::plan_text(), route, grouped));
  CHECK(plan.prefill.steps[3].groups.count == 3);
  CHECK(plan.prefill.steps[3].groups.top == 2);
  CHECK(parse(test::plan_text()).prefill.steps[3].groups.count == 1);
  refused(route, route + R"("groups": 2, "top_groups": 1, )", {"groups", "does not divide num_experts 3"});
  refused(route, route + R"("groups": 3, "top_groups": 1, )", {"top_groups", "holds fewer than top_k experts"});
  refused(route, route + R"("groups": 3, "top_groups": 4, )", {"top_groups"});
  refused(route, route + R"("groups": 3, )", {"top_groups"});
}

TEST_CASE("expressions") {
  const SymbolValues values{5, 20, 64};
  CHECK(expression(R"(["floordiv", ["add", "n", 31], 32])").evaluate(values) == 1);
  CHECK(expression(R"(["floordiv", ["sub", 0, "n"], 2])").evaluate(values) == -3);
  CHECK(expression(R"(["floormod", ["sub", 0, "n"], 4])").evaluate(values) == 3);
  CHECK(expression(R"(["min", ["mul", "n", 4], "position"])").evaluate({6, 20, 64}) == 20);
  CHECK(expression(R"(["max", "context", 100])").evaluate(values) == 100);
  const Interval range = expression(R"(["sub", ["mul", "n", 3], "position"])").range();
  CHECK(range.low == 3 - 128);
  CHECK(range.high == 48);
  CHECK(expression("7").fixed());
  CHECK(expression(R"(["add", "context", 1])").fixed());
  CHECK(!expression(R"(["add", "context", "n"])").fixed());
}

TEST_CASE("expressions that are refused") {
  const auto bad = [](const std::string& text, const std::string& part) {
    test::expect_error([&] { expression(text); }, {part});
  };
  bad(R"(["floordiv", "n", "position"])", "divisor");
  bad(R"(["floormod", "n", 0])", "divisor");
  bad(R"(["floordiv", "n", ["sub", 0, 2]])", "divisor");
  bad(R"(["pow", "n", 2])", "not one of");
  bad(R"("m")", "not one of");
  bad(R"(["add", "n"])", "no expression");
  bad("1.5", "no expression");
  bad("null", "no expression");
  bad(R"(["mul", 281474976710656, 281474976710656])", "2^48");
  bad(R"(["mul", 281474976710656, "n"])", "2^48");
  std::string deep = "1", wide = "1";
  for (int i = 0; i < 20; ++i) deep = "[\"add\", 1, " + deep + "]";
  bad(deep, "larger than any plan");
  for (int i = 0; i < 6; ++i) wide = "[\"add\", " + wide + ", " + wide + "]";
  bad(wide, "larger than any plan");
}

TEST_CASE("a plan that disagrees with the manifest or the index is refused") {
  refused("\"version\": 1", "\"version\": 2", {"version"});
  refused("\"n\": [1, 16]", "\"n\": [1, 32]", {"symbols.n", "16 tokens"});
  refused("\"hidden_size\": 64", "\"hidden_size\": 32", {"hidden_size"});
  refused("\"layers\": 3", "\"layers\": 4", {"kv.layers"});
  refused("{\"dtype\": \"float16\", \"layers\"", "{\"dtype\": \"float32\", \"layers\"", {"kv.dtype"});
  refused("\"tiles\": 1", "\"tiles\": 3", {"tiles"});
  refused("\"name\": \"embedding\"", "\"name\": \"nothing\"", {"index.json has no tensor"});
  refused("\"shape\": [256]", "\"shape\": [257]", {"1024 bytes"});
  refused("\"shape\": [1, 100]", "\"shape\": [1, 99]", {"last dimension"});
}

TEST_CASE("buffers and steps that reach outside are refused") {
  refused("\"workspace_bytes\": 16640", "\"workspace_bytes\": 16639", {"offset", "workspace_bytes"});
  refused("\"workspace_bytes\": 16640", "\"workspace_bytes\": -1", {"workspace_bytes"});
  refused("\"offset\": 4096", "\"offset\": 4100", {"multiple of 64"});
  refused("\"offset\": 4096", "\"offset\": 9223372036854775807", {"offset"});
  refused("\"output\": 2", "\"output\": 13", {"output"});
  refused("\"output\": 2", "\"output\": 1", {"output"});
  refused("\"output\": 2", "\"output\": -1", {"output"});
  refused("{\"buffer\": 1}", "{\"buffer\": 99}", {"args[1].buffer"});
  refused("{\"buffer\": 1}", "{\"bufer\": 1}", {"args[1]"});
  refused("\"k_cache\", \"layer\": 0", "\"k_cache\", \"layer\": 3", {"layer"});
  refused("\"layer\": 1, \"logits\"", "\"layer\": 2, \"logits\"", {"layer"});
  refused("\"kernel\": \"embed\"", "\"kernel\": \"../x\"", {"kernel's name"});
  refused("\"op\": \"route\"", "\"op\": \"jump\"", {"not one of"});
  refused("\"ids\": 4, \"weights\"", "\"ids\": 5, \"weights\"", {"ids", "int32"});
  refused("\"logits\": 3", "\"logits\": 5", {"logits", "fewer scores"});
  refused("\"logits\": 3", "\"logits\": 1", {"logits", "no workspace buffer"});
  refused("[\"mul\", \"n\", 2]", "[\"mul\", \"n\", 1]", {"rows", "wrong for n"});
  refused("[\"max\", \"n\", 2]", "\"n\"", {"scratch", "wrong for n = 1"});
  refused("\"offset\": 15616, \"dtype\": \"int32\", \"shape\": [[\"max\", \"n\", 2], 16]",
          "\"offset\": 15616, \"dtype\": \"int32\", \"shape\": [[\"max\", \"n\", 2], 8]", {"scratch", "64 bytes"});
  refused("\"shape\": [2, \"context\", 16]}", "\"shape\": [2, \"n\", 16]}", {"depends on the tokens"});
  refused("\"shape\": [\"n\", 64]", "\"shape\": [[\"sub\", \"n\", 2], 64]", {"negative"});
  refused("\"shape\": [\"n\", 64]", "\"shape\": [1048576, 1048576, \"n\"]", {"1 TiB"});
  refused("\"kernel\": \"head\", \"args\"", "\"kernel\": \"he ad\", \"args\"", {"kernel's name"});
}

TEST_CASE("text that is no plan is refused") {
  const std::string text = test::plan_text();
  for (size_t length = 0; length < text.size(); length += 97) {
    test::expect_error([&] { parse(text.substr(0, length)); }, {"plan.json"});
  }
  for (const char* bad : {"[]", "null", "{\"version\": 1}", "{\"version\": 1, \"symbols\": []}"}) {
    test::expect_error([&] { parse(bad); }, {"plan.json"});
  }
}

}  // namespace cfmoe
