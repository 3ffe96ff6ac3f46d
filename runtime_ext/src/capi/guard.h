// What every file of the C API shares: exceptions become a status and a line of text, and callers' structs are checked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "cfmoe/cfmoe.h"
#include "error.h"

namespace cfmoe::capi {

inline void write_error(const std::string& message, char* error, size_t error_size) {
  if (error == nullptr || error_size == 0) return;
  size_t length = std::min(message.size(), error_size - 1);
  // Never half a character.
  while (length < message.size() && length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80U)
    --length;
  for (size_t i = 0; i < length; ++i) error[i] = message[i] == '\n' || message[i] == '\r' ? ' ' : message[i];
  error[length] = '\0';
}

template <typename Body>
cfmoe_status guarded(char* error, size_t error_size, Body&& body) noexcept {
  try {
    body();
    return CFMOE_OK;
  } catch (const Error& e) {
    write_error(e.what(), error, error_size);
    switch (e.kind()) {
      case ErrorKind::kUser: return CFMOE_USER;
      case ErrorKind::kCancelled: return CFMOE_CANCELLED;
      case ErrorKind::kInternal: return CFMOE_INTERNAL;
    }
    return CFMOE_INTERNAL;
  } catch (const std::bad_alloc&) {
    write_error("the system has no memory left: lower --memory-budget or --context-size", error, error_size);
    return CFMOE_USER;
  } catch (const std::exception& e) {
    write_error(e.what(), error, error_size);
  } catch (...) {
    write_error("an unknown fault", error, error_size);
  }
  return CFMOE_INTERNAL;
}

inline void require(bool condition, const char* message) {
  if (!condition) throw Error(message);
}

inline void require_size(uint32_t given, size_t expected, const char* name) {
  if (given == expected) return;
  throw Error(std::string(name) + ".struct_size is " + std::to_string(given) + ", this library expects " +
              std::to_string(expected) + ": call " + name + "_init, and build against this library's header");
}

}  // namespace cfmoe::capi
