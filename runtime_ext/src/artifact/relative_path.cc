// Tells whether a path named inside an artifact stays inside it.
#include "artifact/relative_path.h"

namespace cfmoe {

bool is_inside_artifact(std::string_view relative) {
  for (char c : relative) {
    if (static_cast<unsigned char>(c) < 32 || c == 127 || c == '\\' || c == ':') return false;
  }
  while (true) {
    size_t slash = relative.find('/');
    std::string_view part = relative.substr(0, slash);
    if (part.empty() || part == "." || part == "..") return false;
    if (slash == std::string_view::npos) return true;
    relative.remove_prefix(slash + 1);
  }
}

}  // namespace cfmoe
