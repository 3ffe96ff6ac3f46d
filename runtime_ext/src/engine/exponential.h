// The exponential of routing and sampling: the same bits whatever the C library and the CPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

namespace cfmoe {

// e**x within 1.5 ulp for x >= -708, 0 below, infinity above 709; NaN stays NaN. Needs -ffp-contract=off.
// Cody-Waite reduction by ln 2, then the Taylor polynomial of degree 13: its error on |r| <= ln(2) / 2 is below 5e-18.
inline double exponential(double x) {
  constexpr double kLowest = -708.0, kHighest = 709.0;
  constexpr double kRounds = 0x1.8p52;  // adding it leaves a whole number in the lowest bits
  constexpr double kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  const double clipped = std::min(std::max(x, kLowest), kHighest);
  const double shifted = clipped * kLog2E + kRounds;
  const double k = shifted - kRounds;
  const double r = clipped - k * kLn2High - k * kLn2Low;
  double sum = 1.0 / 6227020800.0;
  for (const double coefficient : {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                   1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0}) {
    sum = sum * r + coefficient;
  }
  const double value = std::bit_cast<double>(std::bit_cast<uint64_t>(sum) + (std::bit_cast<uint64_t>(shifted) << 52));
  return x != x ? x : x < kLowest ? 0.0 : x > kHighest ? std::numeric_limits<double>::infinity() : value;
}

inline float exponential(float x) { return static_cast<float>(exponential(static_cast<double>(x))); }

}  // namespace cfmoe
