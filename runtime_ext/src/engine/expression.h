// The small integer expressions of plan.json: shapes and scalars as functions of three symbols.
#pragma once

#include <cstdint>
#include <vector>

#include "artifact/json_reader.h"

namespace cfmoe {

struct Interval {
  int64_t low = 0, high = 0;
};

struct SymbolValues {
  int64_t n = 1;         // tokens in this run
  int64_t position = 0;  // of the first of them
  int64_t context = 0;   // rows of the KV cache
};

struct SymbolBounds {
  Interval n, position, context;
};

class Expression {
 public:
  enum class Op : uint8_t { kConstant, kN, kPosition, kContext, kAdd, kSub, kMul, kFloorDiv, kFloorMod, kMin, kMax };

  Expression() = default;
  explicit Expression(int64_t constant);

  // Throws where the text is no expression, is deeper or longer than any plan needs, or where a value of the symbols
  // within `bounds` could overflow or divide by something that is not positive.
  static Expression parse(const JsonValue& json, const SymbolBounds& bounds);

  // For symbols within the bounds given to parse.
  int64_t evaluate(const SymbolValues& values) const;
  // Contains every value that the expression can take for symbols within the bounds given to parse.
  Interval range() const { return range_; }
  bool uses(Op symbol) const;
  // True unless the value depends on the tokens of a run.
  bool fixed() const { return !uses(Op::kN) && !uses(Op::kPosition); }

 private:
  struct Term {
    Op op = Op::kConstant;
    int64_t value = 0;
  };
  Interval parse_into(const JsonValue& json, const SymbolBounds& bounds, int32_t depth);

  std::vector<Term> terms_;  // postfix
  Interval range_;
};

}  // namespace cfmoe
