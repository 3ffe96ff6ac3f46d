// The protocol of docs/serve-stdio.md: one JSON object a line, requests in, events out.
#pragma once

#include <cstdio>

namespace cfmoe::tools {

// Serves until `in` ends or a quit, then returns the exit code. What fails, fails as an event.
int serve_stdio(std::FILE* in, std::FILE* out);

}  // namespace cfmoe::tools
