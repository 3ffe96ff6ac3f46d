// Measures an artifact's expert kernels on a GPU, without the engine around them.
#pragma once

#include <string>
#include <vector>

namespace cfmoe::tools {

// `arguments` follow the command's name. Prints a table, or one JSON object; returns the process's exit code.
int bench_kernels(const std::vector<std::string>& arguments);

}  // namespace cfmoe::tools
