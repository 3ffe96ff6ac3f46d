// How fast an artifact runs at given memory budgets.
#pragma once

#include <string>
#include <vector>

namespace cfmoe::tools {

// Runs the command and returns its exit code.
int bench(const std::vector<std::string>& arguments);

}  // namespace cfmoe::tools
