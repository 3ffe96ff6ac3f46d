// The small integer expressions of plan.json: shapes and scalars as functions of three symbols.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "artifact/json_reader.h"

namespace cfmoe {

struct Interval {
  int64_t low = 0, high = 0;
};

struct SymbolValues {
  int64_t n = 1;                       // tokens in this run
  int64_t position = 0;                // of the first of them
  int64_t context = 0;                 // rows of the KV cache
  std::span<const int32_t> scalars{};  // of a GPU kernel's call, for its grid
};

struct SymbolBounds {
  Interval n, position, context;
};

class Expression {
 public:
  enum class Op : uint8_t {
    kConstant,
    kN,
    kPosition,
    kContext,
    kAdd,
    kSub,
    kMul,
    kFloorDiv,
    kFloorMod,
    kMin,
    kMax,
    kScalar
  };

  Expression() = default;
  explicit Expression(int64_t constant);

  // Throws where the text is no expression, is deeper or longer than any plan needs, or where a value of the symbols
  // within `bounds` could overflow or divide by something that is not positive.
  static Expression parse(const JsonValue& json, const SymbolBounds& bounds);
  // An expression over s0, s1, … instead, the `scalars` arguments of a kernel, each 0 to kMaxScalar.
  static Expression parse_grid(const JsonValue& json, uint32_t scalars);
  static constexpr int64_t kMaxScalar = int64_t{1} << 24;

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
  struct Symbols {
    SymbolBounds bounds;
    uint32_t scalars = 0;
    bool grid = false;
  };
  static Expression parse_with(const JsonValue& json, const Symbols& symbols);
  Interval parse_into(const JsonValue& json, const Symbols& symbols, int32_t depth);
  Interval parse_symbol(const JsonValue& json, const Symbols& symbols);

  std::vector<Term> terms_;  // postfix
  Interval range_;
};

}  // namespace cfmoe
