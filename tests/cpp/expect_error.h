// Checks that a statement throws cfmoe::Error with a message that has the given parts and is one line.
#pragma once

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "error.h"

namespace cfmoe::test {

template <typename Function>
void expect_error(Function&& function, const std::vector<std::string>& parts) {
  std::string message;
  try {
    function();
  } catch (const Error& error) {
    message = error.what();
  }
  INFO("message: ", message);
  CHECK(!message.empty());
  CHECK(message.find('\n') == std::string::npos);
  for (const std::string& part : parts) {
    INFO("wanted: ", part);
    CHECK(message.find(part) != std::string::npos);
  }
}

}  // namespace cfmoe::test
