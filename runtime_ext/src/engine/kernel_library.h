// The compiled kernels of one target, and how they are called.
#pragma once

#include <tvm/ffi/c_api.h>

#include <memory>
#include <string>

namespace cfmoe {

// A kernel of a library that is still open. Calling it costs one indirect call.
struct Kernel {
  TVMFFISafeCallType function = nullptr;
  void* self = nullptr;
  const char* name = "";

  // Throws cfmoe::Error with the kernel's own message.
  void operator()(const TVMFFIAny* arguments, int32_t count) const {
    TVMFFIAny result{};
    if (function(self, arguments, count, &result) != 0) fail();
  }
  [[noreturn]] void fail() const;
};

class KernelLibrary {
 public:
  // Throws cfmoe::Error where the file cannot be loaded. Its digest is the caller's concern, before.
  explicit KernelLibrary(const std::string& path);
  // The kernels of an artifact as they were linked into this program. Throws cfmoe::Error where it has those of others.
  static std::unique_ptr<KernelLibrary> linked(const std::string& directory, const std::string& kernel_set,
                                               const std::string& target);
  // Whether this program brings its kernels instead of loading those of artifacts.
  static bool is_static();
  ~KernelLibrary();
  KernelLibrary(const KernelLibrary&) = delete;
  KernelLibrary& operator=(const KernelLibrary&) = delete;

  // Throws cfmoe::Error naming the library and the kernel where it is missing.
  Kernel get(const std::string& name);

 private:
  struct Impl;
  explicit KernelLibrary(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace cfmoe
