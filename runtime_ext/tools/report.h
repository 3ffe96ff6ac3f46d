// The C API's structs as JSON objects, named as `cfmoe run --json` names them.
#pragma once

#include <cstdint>

#include "cfmoe/cfmoe.h"
#include "json_writer.h"

namespace cfmoe::tools {

// Resident memory of this process in bytes, now and at its peak; 0 where the system does not tell.
struct ResidentMemory {
  uint64_t now = 0, peak = 0;
};
ResidentMemory resident_memory();

JsonObject model_json(const cfmoe_engine* engine);
JsonObject memory_json(const cfmoe_engine* engine);
JsonObject metrics_json(const cfmoe_session* session);
// One string of 0 and 1 per MoE layer, one character per expert.
std::string residents_json(const cfmoe_engine* engine);

}  // namespace cfmoe::tools
