// Opens an artifact directory and reads its small files whole.
#include "artifact/artifact_files.h"

#include <fcntl.h>
#include <sys/stat.h>

#include "artifact/checksum.h"
#include "artifact/cpu_features.h"
#include "error.h"
#include "store/file_handle.h"

namespace cfmoe {
namespace {

constexpr char kManifest[] = "manifest.json";
constexpr uint64_t kMaxManifest = uint64_t{16} << 20;
// Plans, kernel libraries, tokenizers; the two large files are never read whole.
constexpr uint64_t kMaxWholeFile = uint64_t{1} << 30;

std::string read_whole(const FileHandle& file, uint64_t size) {
  std::string text(size, '\0');
  uint64_t got = file.read_at(0, text.data(), size);
  if (got != size)
    throw Error(file.path() + ": the file ends after " + std::to_string(got) + " of " + std::to_string(size) +
                " bytes");
  return text;
}

const FileEntry& entry_of(const std::string& directory, const Manifest& manifest, const std::string& relative) {
  auto it = manifest.files.find(relative);
  if (it == manifest.files.end()) {
    throw Error(directory + "/" + relative +
                ": the manifest does not list this file; compile the artifact again with cfmoe compile");
  }
  return it->second;
}

void check_size(const FileHandle& file, const FileEntry& entry) {
  uint64_t size = file.size();
  if (size == entry.size) return;
  throw Error(file.path() + ": has " + std::to_string(size) + " bytes, the manifest says " +
              std::to_string(entry.size) + "; copy the artifact again or compile it again with cfmoe compile");
}

void check_agreement(const Artifact& artifact) {
  const ExpertIndex& experts = artifact.index.experts;
  const ModelFacts& model = artifact.manifest.model;
  if (static_cast<size_t>(experts.layers) == model.moe_layers.size() && experts.experts == model.num_experts) return;
  throw Error(artifact.path_of("index.json") + ": describes " + std::to_string(experts.layers) + " layers of " +
              std::to_string(experts.experts) + " experts, the manifest " + std::to_string(model.moe_layers.size()) +
              " of " + std::to_string(model.num_experts) + "; compile the artifact again with cfmoe compile");
}

}  // namespace

uint64_t check_file_size(const std::string& directory, const Manifest& manifest, const std::string& relative) {
  const FileEntry& entry = entry_of(directory, manifest, relative);
  check_size(FileHandle::open(directory + "/" + relative), entry);
  return entry.size;
}

std::string read_verified(const std::string& directory, const Manifest& manifest, const std::string& relative) {
  const FileEntry& entry = entry_of(directory, manifest, relative);
  FileHandle file = FileHandle::open(directory + "/" + relative);
  check_size(file, entry);
  if (entry.size > kMaxWholeFile)
    throw Error(file.path() + ": has " + std::to_string(entry.size) + " bytes, more than is read at once");
  std::string text = read_whole(file, entry.size);
  uint64_t digest = xxh3_64(text);
  if (digest != entry.xxh3_64) {
    throw Error(file.path() + ": damaged: its digest is " + format_digest(digest) + ", the manifest says " +
                format_digest(entry.xxh3_64) + "; copy the artifact again or compile it again with cfmoe compile");
  }
  return text;
}

Manifest read_manifest(const std::string& directory) {
  struct stat facts = {};
  if (::stat(directory.c_str(), &facts) != 0 || !S_ISDIR(facts.st_mode)) {
    throw Error(directory + ": is not a directory; give the artifact directory that cfmoe compile wrote");
  }
  const std::string path = directory + "/" + kManifest;
  if (::stat(path.c_str(), &facts) != 0) {
    throw Error(directory +
                ": has no manifest.json, so it is not an artifact; give the directory that cfmoe compile wrote");
  }
  FileHandle file = FileHandle::open(path);
  uint64_t size = file.size();
  if (size > kMaxManifest) throw Error(path + ": has " + std::to_string(size) + " bytes, too many for a manifest");
  return parse_manifest(read_whole(file, size), path);
}

Artifact open_artifact(const std::string& directory) {
  Artifact artifact;
  artifact.directory = directory;
  artifact.manifest = read_manifest(directory);
  uint64_t weights_size = check_file_size(directory, artifact.manifest, "weights.bin");
  uint64_t experts_size = check_file_size(directory, artifact.manifest, "experts.bin");
  artifact.index = parse_index(read_verified(directory, artifact.manifest, "index.json"),
                               artifact.path_of("index.json"), weights_size, experts_size);
  check_agreement(artifact);
  return artifact;
}

void check_target_files(const Artifact& artifact, const TargetEntry& target) {
  check_file_size(artifact.directory, artifact.manifest, target.library);
  check_file_size(artifact.directory, artifact.manifest, target.plan);
}

TargetEntry cpu_target(const Artifact& artifact) {
  TargetEntry target = pick_cpu_target(artifact.manifest, artifact.path_of(kManifest), host_cpu());
  check_target_files(artifact, target);
  return target;
}

}  // namespace cfmoe
