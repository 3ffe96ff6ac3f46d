// One prompt and one answer of fixed lengths for each memory budget, each with an engine of its own.
#include "bench.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "open_session.h"
#include "profile.h"
#include "report.h"

namespace cfmoe::tools {
namespace {

constexpr int kMostRepeats = 8;
constexpr uint32_t kDefaultContext = 4096;  // of cfmoe_engine_options

struct Options {
  std::string artifact, io = "auto", policy, device = "cpu", prefill_device, decode_device;
  std::vector<std::string> budgets;
  uint32_t prompt_tokens = 128, new_tokens = 64, context_size = 0;
  int32_t threads = 0, repeat = 1;
  bool json = false, profile = false;
};

template <typename Integer>
Integer parse_integer(const std::string& option, const std::string& text, Integer most) {
  Integer value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value > most || value < 0)
    throw std::invalid_argument(option + " " + text + " is no number from 0 to " + std::to_string(most));
  return value;
}

// "800MiB", "50%" or bytes.
void parse_budget(const std::string& text, cfmoe_engine_options* out) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  const std::string unit = end;
  static const std::vector<std::pair<std::string, double>> kUnits = {
      {"", 1},     {"B", 1},    {"KiB", 1024.0}, {"MiB", 1048576.0}, {"GiB", 1073741824.0}, {"kB", 1000.0},
      {"MB", 1e6}, {"GB", 1e9}, {"%", 0}};
  for (const auto& [name, factor] : kUnits) {
    if (unit != name || end == text.c_str() || !(number > 0 && number < 1e15)) continue;
    if (name == "%") {
      out->expert_percent = number;
    } else {
      out->budget_bytes = static_cast<uint64_t>(number * factor);
    }
    return;
  }
  throw std::invalid_argument("--memory-budget " + text + " is no size: write bytes, 800MiB or 50%");
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (!name.starts_with("--")) {
      if (!options.artifact.empty()) throw std::invalid_argument(name + ": one artifact at a time");
      options.artifact = name;
      continue;
    }
    if (name == "--json" || name == "--profile") {
      (name == "--json" ? options.json : options.profile) = true;
      continue;
    }
    if (i + 1 == arguments.size()) throw std::invalid_argument(name + " needs a value, or is unknown");
    const std::string& value = arguments[++i];
    if (name == "--memory-budget") {
      for (size_t begin = 0; begin <= value.size();) {
        const size_t end = std::min(value.find(',', begin), value.size());
        options.budgets.push_back(value.substr(begin, end - begin));
        begin = end + 1;
      }
    } else if (name == "--prompt-tokens") {
      options.prompt_tokens = parse_integer<uint32_t>(name, value, 1 << 20);
    } else if (name == "--new-tokens") {
      options.new_tokens = parse_integer<uint32_t>(name, value, 1 << 20);
    } else if (name == "--context-size") {
      options.context_size = parse_integer<uint32_t>(name, value, 1 << 24);
    } else if (name == "--threads") {
      options.threads = parse_integer<int32_t>(name, value, 1024);
    } else if (name == "--io") {
      options.io = value;
    } else if (name == "--policy") {
      options.policy = value;
    } else if (name == "--repeat") {
      options.repeat = parse_integer<int32_t>(name, value, 1000);
    } else if (name == "--device") {
      options.device = value;
    } else if (name == "--prefill-device") {
      options.prefill_device = value;
    } else if (name == "--decode-device") {
      options.decode_device = value;
    } else {
      throw std::invalid_argument(name + " is unknown: see cfmoe-engine --help");
    }
  }
  if (options.artifact.empty()) throw std::invalid_argument("bench needs the artifact's directory");
  if (options.budgets.empty()) options.budgets.emplace_back();
  return options;
}

double rate_between(const cfmoe_phase_metrics& before, const cfmoe_phase_metrics& after) {
  return static_cast<double>(after.tokens - before.tokens) / (after.seconds - before.seconds);
}

JsonObject measure(const Options& options, const std::string& budget) {
  cfmoe_engine_options open;
  cfmoe_engine_options_init(&open);
  if (!budget.empty()) parse_budget(budget, &open);
  open.context_size = options.context_size;
  open.threads = options.threads;
  open.io = options.io.c_str();
  if (!options.policy.empty()) open.policy = options.policy.c_str();
  open.device = options.device.c_str();
  if (!options.prefill_device.empty()) open.prefill_device = options.prefill_device.c_str();
  if (!options.decode_device.empty()) open.decode_device = options.decode_device.c_str();
  char error[kErrorBytes];
  const OpenSession opened(options.artifact, open);
  cfmoe_engine* const engine = opened.engine();
  cfmoe_session* const session = opened.session();

  cfmoe_model_info model = {};
  cfmoe_engine_model(engine, &model);
  std::vector<int32_t> prompt(options.prompt_tokens), tokens(options.new_tokens);
  for (size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<int32_t>((31 * i + 7) % model.vocab_size);
  uint32_t count = 0;
  const int32_t no_stop = 0;
  // The first run of a kernel is slower than all others.
  check(cfmoe_session_generate(session, prompt.data(), std::min<uint32_t>(options.prompt_tokens, 4), 2, nullptr,
                               &no_stop, 0, nullptr, nullptr, nullptr, &count, error, sizeof(error)),
        error);
  check(cfmoe_session_reset(session, error, sizeof(error)), error);
  check(cfmoe_session_generate(session, prompt.data(), options.prompt_tokens, options.new_tokens, nullptr, &no_stop, 0,
                               nullptr, nullptr, tokens.data(), &count, error, sizeof(error)),
        error);
  std::string ids = "[";
  for (uint32_t i = 0; i < count; ++i) ids += (i == 0 ? "" : ", ") + std::to_string(tokens[i]);
  const std::string first_metrics = metrics_json(session).str();
  cfmoe_metrics metrics = {};
  cfmoe_session_metrics(session, &metrics);
  // The same prompt again, its experts in memory as far as the budget goes.
  double second_rate = 0;
  if (cfmoe_session_position(session) + options.prompt_tokens <= model.context_size) {
    check(cfmoe_session_feed(session, prompt.data(), options.prompt_tokens, 0, nullptr, error, sizeof(error)), error);
    cfmoe_metrics second = {};
    cfmoe_session_metrics(session, &second);
    second_rate = static_cast<double>(second.prefill.tokens - metrics.prefill.tokens) /
                  (second.prefill.seconds - metrics.prefill.seconds);
  }
  // Until no expert of it is missing any more; then an answer, whose own new experts count.
  double resident_prefill = 0, resident_decode = 0;
  const uint32_t room = std::min(model.context_size, options.context_size > 0 ? options.context_size : kDefaultContext);
  cfmoe_metrics before = {}, after = {};
  cfmoe_session_metrics(session, &before);
  for (int i = 0; i < kMostRepeats; ++i) {
    if (cfmoe_session_position(session) + options.prompt_tokens + options.new_tokens + 1 > room) break;
    check(cfmoe_session_feed(session, prompt.data(), options.prompt_tokens, 0, nullptr, error, sizeof(error)), error);
    cfmoe_session_metrics(session, &after);
    const cfmoe_metrics last = std::exchange(before, after);
    if (after.prefill.misses > last.prefill.misses) continue;
    resident_prefill = rate_between(last.prefill, after.prefill);
    check(cfmoe_session_generate(session, prompt.data(), 1, options.new_tokens, nullptr, &no_stop, 0, nullptr, nullptr,
                                 tokens.data(), &count, error, sizeof(error)),
          error);
    cfmoe_session_metrics(session, &after);
    resident_decode = rate_between(before.decode, after.decode);
    break;
  }
  JsonObject out;
  out.add("memory_budget", budget)
      .add("prefill_device", cfmoe_engine_device(engine, 0))
      .add("decode_device", cfmoe_engine_device(engine, 1))
      .add("device_name", cfmoe_engine_device_name(engine))
      .add("io", cfmoe_engine_io(engine))
      .add("policy", cfmoe_engine_policy(engine))
      .add("warning", cfmoe_engine_warning(engine))
      .add("prompt_tokens", options.prompt_tokens)
      .add("new_tokens", count)
      .raw("token_ids", ids + "]")
      .raw("metrics", first_metrics)
      .add("second_prefill_tokens_per_s", second_rate)
      .add("resident_prefill_tokens_per_s", resident_prefill)
      .add("resident_decode_tokens_per_s", resident_decode)
      .add("memory", memory_json(engine));
  if (!options.json) {
    cfmoe_memory memory = {};
    cfmoe_engine_memory(engine, &memory);
    const auto rate = [](const cfmoe_phase_metrics& phase) {
      return phase.seconds > 0 ? static_cast<double>(phase.tokens) / phase.seconds : 0.0;
    };
    const double accesses = static_cast<double>(metrics.decode.hits + metrics.decode.misses);
    std::printf(
        "%10.1f MiB %6u of %-6u %10.1f %10.1f %9.3f %12.1f\n", static_cast<double>(memory.budget_bytes) / 1048576.0,
        memory.expert_slots, memory.expert_total, rate(metrics.prefill), rate(metrics.decode),
        accesses > 0 ? static_cast<double>(metrics.decode.hits) / accesses : 0.0,
        metrics.decode.tokens > 0
            ? static_cast<double>(metrics.decode.bytes_read) / static_cast<double>(metrics.decode.tokens) / 1024.0
            : 0.0);
    std::fflush(stdout);
  }
  return out;
}

JsonObject measure_profile(const Options& options, const std::string& budget) {
  cfmoe_engine_options sizes = {};
  if (!budget.empty()) parse_budget(budget, &sizes);
  ProfileRequest request;
  request.artifact = options.artifact;
  request.prompt_tokens = options.prompt_tokens;
  request.new_tokens = options.new_tokens;
  request.options.budget_bytes = sizes.budget_bytes;
  request.options.expert_percent = sizes.expert_percent;
  request.options.context_size = options.context_size;
  request.options.threads = options.threads;
  request.options.io = options.io;
  if (!options.policy.empty()) request.options.policy = options.policy;
  request.options.placement = {options.device, options.prefill_device, options.decode_device};
  if (!options.json) std::printf("budget %s\n", budget.empty() ? "(all that fits)" : budget.c_str());
  JsonObject out;
  out.add("memory_budget", budget).raw("profile", profile(request, options.json).str());
  return out;
}

}  // namespace

int bench(const std::vector<std::string>& arguments) {
  try {
    const Options options = parse(arguments);
    if (!options.json && !options.profile)
      std::printf("        budget          experts  prefill/s   decode/s  hit rate  KiB/token\n");
    std::string results;
    for (int32_t round = 0; round < options.repeat; ++round) {
      for (const std::string& budget : options.budgets)
        results += (results.empty() ? "" : ", ") +
                   (options.profile ? measure_profile(options, budget) : measure(options, budget)).str();
    }
    if (options.json) std::printf("{\"results\": [%s]}\n", results.c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}

}  // namespace cfmoe::tools
