// A driver's loader, opened while the program runs.
#include "device/shared_library.h"

#include <dlfcn.h>

namespace cfmoe::device {

SharedLibrary::SharedLibrary(std::initializer_list<const char*> names) {
  for (const char* name : names) {
    handle_ = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) return;
    if (reason_.empty()) {
      const char* error = ::dlerror();
      reason_ = error == nullptr ? name : error;
    }
  }
}

void* SharedLibrary::symbol(const char* name) const { return ::dlsym(handle_, name); }

}  // namespace cfmoe::device
