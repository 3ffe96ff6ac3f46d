// What ExpertsStep asks of whoever computes experts: a CPU's threads or a GPU.
#pragma once

#include <cstdint>
#include <span>

#include "cache/expert_view.h"

namespace cfmoe {

// The part of one expert in a wave: `count` rows, listed from `list` on in both lists of ExpertLists, with their
// intermediate rows from `scratch_row` on.
struct ExpertShare {
  ExpertView view;
  int32_t list = 0;
  int32_t count = 1;
  int32_t scratch_row = 0;
};

class ExpertCompute {
 public:
  virtual ~ExpertCompute() = default;
  // The shares of one wave, of the program that called the step. With `more`, other waves of the layer follow when
  // their experts have been loaded.
  virtual void run(std::span<const ExpertShare> wave, bool more) = 0;
};

}  // namespace cfmoe
