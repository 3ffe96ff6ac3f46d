// The digest of an artifact's logits, by which a machine is compared with others.
#pragma once

#include <string>
#include <vector>

namespace cfmoe::tools {

// Runs the command and returns its exit code.
int logits(const std::vector<std::string>& arguments);

}  // namespace cfmoe::tools
