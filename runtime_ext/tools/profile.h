// Where the time of prefill and decode goes on a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "engine/engine.h"
#include "json_writer.h"

namespace cfmoe::tools {

struct ProfileRequest {
  std::string artifact;
  EngineOptions options;
  uint32_t prompt_tokens = 0, new_tokens = 0;
};

// Runs the prompt, the answer and the prompt once more, twice: for the host's parts undisturbed, then with timestamps
// around every kernel. Prints tables unless `quiet`. Throws cfmoe::Error where nothing runs on a GPU.
JsonObject profile(const ProfileRequest& request, bool quiet);

}  // namespace cfmoe::tools
