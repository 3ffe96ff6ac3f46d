// What the CPU that we run on offers, in LLVM's names, as manifests use them.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "artifact/manifest.h"

namespace cfmoe {

struct CpuFacts {
  std::string arch;  // x86_64, aarch64
  std::set<std::string> features;
};

CpuFacts host_cpu();

// What `target` needs and `cpu` lacks, as text for a message; empty if it runs here.
std::vector<std::string> missing_for(const TargetEntry& target, const CpuFacts& cpu);

// The CPU target that asks for the most of what `cpu` has. Throws cfmoe::Error naming what is missing if none runs
// here.
const TargetEntry& pick_cpu_target(const Manifest& manifest, const std::string& path, const CpuFacts& cpu);

}  // namespace cfmoe
