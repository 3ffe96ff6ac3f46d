// A program of a plan, bound to memory once and run many times, on a CPU or a GPU.
#pragma once

#include <cstdint>

namespace cfmoe {

// Which tokens' rows of its output a run is asked for.
enum class OutputRows : uint8_t { kNone, kLast, kAll };

class Program {
 public:
  virtual ~Program() = default;
  // Where the caller writes the program's input before a run.
  virtual void* input() = 0;
  // `n` tokens, the first at `position`; both within the plan's bounds. The caller's thread runs the serial parts; see
  // PoolScope.
  virtual void run(int64_t n, int64_t position, OutputRows rows) = 0;
  // The rows that the last run was asked for, until anything else runs; the caller's to change.
  virtual void* output() = 0;
};

}  // namespace cfmoe
