// Tells whether a path named inside an artifact stays inside it.
#pragma once

#include <string_view>

namespace cfmoe {

// Forward slashes, no empty, "." or ".." parts, no drive letters, no control characters.
bool is_inside_artifact(std::string_view relative);

}  // namespace cfmoe
