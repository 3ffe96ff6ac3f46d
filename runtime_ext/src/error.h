// The one exception type of the runtime; the C API turns it into a status and a line of text.
#pragma once

#include <stdexcept>
#include <string>

namespace cfmoe {

enum class ErrorKind {
  kUser,      // the caller can mend it: the message names the value, the reason and the remedy
  kInternal,  // a fault of ours or of the machine
  kCancelled,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  explicit Error(const std::string& message) : Error(ErrorKind::kUser, message) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace cfmoe
