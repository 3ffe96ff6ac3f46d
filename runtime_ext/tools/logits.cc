// Feeds fixed tokens, some in one go and some one by one, and prints XXH3-64 of the logits behind every one of them.
// CPUs of every kind give the same digests.
#include "logits.h"

#include <cstdint>
#include <cstdio>

#include "artifact/artifact_files.h"
#include "artifact/checksum.h"
#include "error.h"
#include "json_writer.h"
#include "numbers.h"
#include "open_session.h"

namespace cfmoe::tools {
namespace {

constexpr uint32_t kMostTokens = 4096;

struct Options {
  std::string artifact;
  uint32_t prompt_tokens = 100, new_tokens = 8;
  int32_t threads = 0;
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (!name.starts_with("--")) {
      if (!options.artifact.empty()) throw Error(name + ": one artifact at a time");
      options.artifact = name;
      continue;
    }
    if (i + 1 == arguments.size()) throw Error(name + " needs a value, or is unknown");
    const std::string& value = arguments[++i];
    if (name == "--prompt-tokens") {
      options.prompt_tokens = number<uint32_t>(name, value, 1, kMostTokens);
    } else if (name == "--new-tokens") {
      options.new_tokens = number<uint32_t>(name, value, 1, kMostTokens);
    } else if (name == "--threads") {
      options.threads = number<int32_t>(name, value, 0, 1024);
    } else {
      throw Error(name + " is unknown: see cfmoe-engine --help");
    }
  }
  if (options.artifact.empty()) throw Error("logits needs the artifact's directory");
  return options;
}

std::string run(const Options& options) {
  cfmoe_engine_options open;
  cfmoe_engine_options_init(&open);
  open.threads = options.threads;
  char error[kErrorBytes];
  const OpenSession opened(options.artifact, open);
  cfmoe_engine* const engine = opened.engine();
  cfmoe_session* const session = opened.session();
  cfmoe_model_info model = {};
  cfmoe_engine_model(engine, &model);

  JsonObject out;
  out.add("target", cpu_target(open_artifact(options.artifact)).name);
  uint64_t next = 0;
  const auto feed = [&](const char* phase, uint32_t count, bool decode) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) token = static_cast<int32_t>((31 * next++ + 7) % model.vocab_size);
    std::vector<float> logits(size_t{count} * model.vocab_size);
    check(cfmoe_session_feed(session, tokens.data(), count, decode ? 1 : 0, logits.data(), error, sizeof(error)),
          error);
    out.add(phase, format_digest(xxh3_64(logits.data(), logits.size() * sizeof(float))));
  };
  feed("prefill", options.prompt_tokens, false);
  feed("decode", options.new_tokens, true);
  return out.str();
}

}  // namespace

int logits(const std::vector<std::string>& arguments) {
  try {
    std::printf("%s\n", run(parse(arguments)).c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}

}  // namespace cfmoe::tools
