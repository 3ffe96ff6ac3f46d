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
  ~KernelLibrary();
  KernelLibrary(const KernelLibrary&) = delete;
  KernelLibrary& operator=(const KernelLibrary&) = delete;

  // Throws cfmoe::Error naming the library and the kernel where it is missing.
  Kernel get(const std::string& name);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace cfmoe
