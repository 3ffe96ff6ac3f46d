// An artifact opened through the C API with a session on it, for commands that run it once.
#pragma once

#include <memory>
#include <string>

#include "cfmoe/cfmoe.h"
#include "error.h"

namespace cfmoe::tools {

inline constexpr size_t kErrorBytes = 2048;

inline void check(cfmoe_status status, const char* error) {
  if (status != CFMOE_OK) throw Error(error);
}

// Throws cfmoe::Error where the artifact cannot be opened so.
class OpenSession {
 public:
  OpenSession(const std::string& artifact, const cfmoe_engine_options& options) {
    char error[kErrorBytes];
    cfmoe_engine* engine = nullptr;
    check(cfmoe_engine_open(artifact.c_str(), &options, &engine, error, sizeof(error)), error);
    engine_.reset(engine);
    cfmoe_session* session = nullptr;
    check(cfmoe_session_create(engine, &session, error, sizeof(error)), error);
    session_.reset(session);
  }

  cfmoe_engine* engine() const { return engine_.get(); }
  cfmoe_session* session() const { return session_.get(); }

 private:
  std::unique_ptr<cfmoe_engine, void (*)(cfmoe_engine*)> engine_{nullptr, cfmoe_engine_close};
  std::unique_ptr<cfmoe_session, void (*)(cfmoe_session*)> session_{nullptr, cfmoe_session_destroy};
};

}  // namespace cfmoe::tools
