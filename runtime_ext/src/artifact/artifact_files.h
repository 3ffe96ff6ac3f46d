// Opens an artifact directory: manifest, index and targets, every file checked before use.
#pragma once

#include <cstdint>
#include <string>

#include "artifact/index.h"
#include "artifact/manifest.h"

namespace cfmoe {

struct Artifact {
  std::string directory;
  Manifest manifest;
  ArtifactIndex index;

  std::string path_of(const std::string& relative) const { return directory + "/" + relative; }
};

// Throws cfmoe::Error naming the file, the reason and the remedy. The sizes of weights.bin and experts.bin are checked
// here, their digests when they are read.
Artifact open_artifact(const std::string& directory);

// The target for this CPU, and whether its files are there. Throws cfmoe::Error naming what is missing.
TargetEntry cpu_target(const Artifact& artifact);
// Throws unless the target's files are there and have the manifest's sizes.
void check_target_files(const Artifact& artifact, const TargetEntry& target);

// The manifest alone, for what needs no kernels. Throws as open_artifact does.
Manifest read_manifest(const std::string& directory);

// The bytes of `relative`, which the manifest must list; size and digest are checked.
std::string read_verified(const std::string& directory, const Manifest& manifest, const std::string& relative);

// Throws unless the file is there and has the manifest's size; returns that size.
uint64_t check_file_size(const std::string& directory, const Manifest& manifest, const std::string& relative);

}  // namespace cfmoe
