// A driver's loader, opened while the program runs, so that it need not be there.
#pragma once

#include <initializer_list>
#include <string>

namespace cfmoe::device {

class SharedLibrary {
 public:
  // The first of `names` that opens; is_open() says whether one did. It stays in the process: drivers leave threads and
  // thread-local data behind.
  explicit SharedLibrary(std::initializer_list<const char*> names);
  SharedLibrary(const SharedLibrary&) = delete;
  SharedLibrary& operator=(const SharedLibrary&) = delete;

  bool is_open() const { return handle_ != nullptr; }
  const std::string& reason() const { return reason_; }  // why not
  // Null where it is missing.
  void* symbol(const char* name) const;

 private:
  void* handle_ = nullptr;
  std::string reason_;
};

}  // namespace cfmoe::device
