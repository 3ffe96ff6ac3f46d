// Cache files: a magic word, the digest of the contents, the contents.
#include "device/kernel_cache.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "artifact/checksum.h"

namespace cfmoe::device {
namespace {

constexpr std::string_view kMagic = "cfmoe-kernels 1\n";
constexpr size_t kDigits = 16;

std::string cache_directory() {
  const auto value = [](const char* name) -> std::string {
    const char* text = std::getenv(name);
    return text == nullptr ? "" : text;
  };
  if (const std::string own = value("CFMOE_CACHE_DIR"); !own.empty()) return own;
  if (const std::string xdg = value("XDG_CACHE_HOME"); !xdg.empty()) return xdg + "/cfmoe";
  if (const std::string home = value("HOME"); !home.empty()) return home + "/.cache/cfmoe";
  return "";
}

}  // namespace

KernelCache::KernelCache(const char* kind, std::string_view identity) {
  const std::string directory = cache_directory();
  if (!directory.empty()) path_ = directory + "/" + kind + "-" + format_digest(xxh3_64(identity)) + ".bin";
}

std::string KernelCache::load() const {
  if (path_.empty()) return "";
  std::ifstream file(path_, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.size() < kMagic.size() + kDigits || !bytes.starts_with(kMagic)) return "";
  const std::string digest = bytes.substr(kMagic.size(), kDigits);
  bytes.erase(0, kMagic.size() + kDigits);
  return format_digest(xxh3_64(bytes)) == digest ? bytes : "";
}

void KernelCache::store(std::string_view bytes) const {
  if (path_.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), error);
  const std::string temporary =
      path_ + "." + std::to_string(::getpid()) + "." + std::to_string(reinterpret_cast<uintptr_t>(this));
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    file << kMagic << format_digest(xxh3_64(bytes)) << bytes;
    file.close();
    if (!file) {
      std::filesystem::remove(temporary, error);
      return;
    }
  }
  std::filesystem::rename(temporary, path_, error);
  if (error) std::filesystem::remove(temporary, error);
}

}  // namespace cfmoe::device
