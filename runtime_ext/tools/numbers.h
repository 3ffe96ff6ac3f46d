// Whole numbers of the command line.
#pragma once

#include <charconv>
#include <string>

#include "error.h"

namespace cfmoe::tools {

// The value of an option. Throws cfmoe::Error where `text` is no number from `least` to `most`.
template <typename Integer>
Integer number(const std::string& option, const std::string& text, Integer least, Integer most) {
  Integer value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
    throw Error(option + " " + text + " is no number from " + std::to_string(least) + " to " + std::to_string(most));
  return value;
}

}  // namespace cfmoe::tools
