// cfmoe-engine: an artifact without Python. Measures it, or serves it over standard input and output.
#include <cstdio>
#include <string>
#include <vector>

#include "bench.h"
#include "cfmoe/cfmoe.h"
#include "kernel_bench.h"
#include "logits.h"
#include "serve.h"

namespace {

constexpr char kUsage[] =
    "usage: cfmoe-engine bench ARTIFACT [--memory-budget SIZE[,SIZE...]] [--prompt-tokens N] [--new-tokens N]\n"
    "                          [--context-size N] [--threads N] [--io MODE] [--policy NAME] [--repeat N]\n"
    "                          [--device D] [--prefill-device D] [--decode-device D] [--profile] [--json]\n"
    "       cfmoe-engine bench-kernels ARTIFACT [--device vulkan|opencl] [--experts N[,N...]] [--rounds N]\n"
    "                          [--repeat N] [--slab-mib N] [--json]\n"
    "       cfmoe-engine logits ARTIFACT [--prompt-tokens N] [--new-tokens N] [--threads N]\n"
    "                          digests of the logits of fixed tokens, the same on every CPU\n"
    "       cfmoe-engine serve-stdio    requests and answers as JSON lines: docs/serve-stdio.md\n"
    "       cfmoe-engine --version\n";

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::string command = arguments.empty() ? "" : arguments[0];
  if (command == "bench") return cfmoe::tools::bench({arguments.begin() + 1, arguments.end()});
  if (command == "bench-kernels") return cfmoe::tools::bench_kernels({arguments.begin() + 1, arguments.end()});
  if (command == "logits") return cfmoe::tools::logits({arguments.begin() + 1, arguments.end()});
  if (command == "serve-stdio" && arguments.size() == 1) return cfmoe::tools::serve_stdio(stdin, stdout);
  if (command == "--version") {
    std::printf("cfmoe-engine %s, ABI %u\n", cfmoe_version(), cfmoe_abi_version());
    return 0;
  }
  const bool help = command == "--help" || command == "-h";
  std::fputs(kUsage, help ? stdout : stderr);
  return help ? 0 : 2;
}
