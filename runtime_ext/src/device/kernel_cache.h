// What drivers made of kernels, kept on disk so that the next start is quick.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace cfmoe::device {

// One file of the cache directory: $CFMOE_CACHE_DIR, else $XDG_CACHE_HOME/cfmoe, else ~/.cache/cfmoe; none where all
// are unset. The cache saves time alone, so a file that is missing, damaged or not writable is no error.
class KernelCache {
 public:
  // `identity` is everything that the contents depend on: device, driver, kernels.
  KernelCache(const char* kind, std::string_view identity);

  // What was stored, or "" where there is nothing whole.
  std::string load() const;
  // Replaces the file at once or not at all.
  void store(std::string_view bytes) const;
  const std::string& path() const { return path_; }  // "" where there is no cache

 private:
  std::string path_;
};

}  // namespace cfmoe::device
