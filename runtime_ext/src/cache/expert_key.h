// Names one expert of one MoE layer.
#pragma once

#include <cstdint>

namespace cfmoe {

struct ExpertKey {
  int32_t layer = 0;  // ordinal among the MoE layers
  int32_t expert = 0;
  bool operator==(const ExpertKey&) const = default;
};

}  // namespace cfmoe
