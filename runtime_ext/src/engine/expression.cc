// Expressions: parsed to postfix, bounded by interval arithmetic.
#include "engine/expression.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>

namespace cfmoe {
namespace {

constexpr int32_t kMaxDepth = 16;
constexpr size_t kMaxTerms = 64;
constexpr int64_t kMaxMagnitude = int64_t{1} << 48;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0); }
int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

int64_t apply(Expression::Op op, int64_t a, int64_t b) {
  switch (op) {
    case Expression::Op::kAdd: return a + b;
    case Expression::Op::kSub: return a - b;
    case Expression::Op::kMul: return a * b;
    case Expression::Op::kFloorDiv: return floor_div(a, b);
    case Expression::Op::kFloorMod: return floor_mod(a, b);
    case Expression::Op::kMin: return std::min(a, b);
    case Expression::Op::kMax: return std::max(a, b);
    default: return 0;
  }
}

// Operands are at most kMaxMagnitude; only a product can leave 64 bits.
bool combine(Expression::Op op, Interval a, Interval b, Interval* out) {
  using Op = Expression::Op;
  switch (op) {
    case Op::kAdd: *out = {a.low + b.low, a.high + b.high}; break;
    case Op::kSub: *out = {a.low - b.high, a.high - b.low}; break;
    case Op::kMin: *out = {std::min(a.low, b.low), std::min(a.high, b.high)}; break;
    case Op::kMax: *out = {std::max(a.low, b.low), std::max(a.high, b.high)}; break;
    case Op::kFloorMod: *out = {0, b.high - 1}; break;
    case Op::kMul:
    case Op::kFloorDiv: {
      std::array<int64_t, 4> corners;
      size_t i = 0;
      for (int64_t x : {a.low, a.high}) {
        for (int64_t y : {b.low, b.high}) {
          if (op == Op::kFloorDiv) {
            corners[i++] = floor_div(x, y);
          } else if (__builtin_mul_overflow(x, y, &corners[i++])) {
            return false;
          }
        }
      }
      *out = {*std::min_element(corners.begin(), corners.end()), *std::max_element(corners.begin(), corners.end())};
      break;
    }
    default: return false;
  }
  return out->low >= -kMaxMagnitude && out->high <= kMaxMagnitude;
}

}  // namespace

Expression::Expression(int64_t constant) : terms_{{Op::kConstant, constant}}, range_{constant, constant} {}

Expression Expression::parse(const JsonValue& json, const SymbolBounds& bounds) {
  return parse_with(json, {bounds, 0, false});
}

Expression Expression::parse_grid(const JsonValue& json, uint32_t scalars) {
  return parse_with(json, {{}, scalars, true});
}

Expression Expression::parse_with(const JsonValue& json, const Symbols& symbols) {
  Expression expression;
  expression.range_ = expression.parse_into(json, symbols, 0);
  // A run evaluates what can be evaluated once only once.
  if (expression.range_.low == expression.range_.high) return Expression(expression.range_.low);
  return expression;
}

Interval Expression::parse_symbol(const JsonValue& json, const Symbols& symbols) {
  if (symbols.grid) {
    std::vector<std::string> names;
    for (uint32_t i = 0; i < symbols.scalars; ++i) names.push_back("s" + std::to_string(i));
    const std::string name = json.choice(names);
    terms_.push_back({Op::kScalar, std::find(names.begin(), names.end(), name) - names.begin()});
    return {0, kMaxScalar};
  }
  const std::string name = json.choice({"n", "position", "context"});
  terms_.push_back({name == "n" ? Op::kN : name == "position" ? Op::kPosition : Op::kContext, 0});
  const SymbolBounds& bounds = symbols.bounds;
  return name == "n" ? bounds.n : name == "position" ? bounds.position : bounds.context;
}

Interval Expression::parse_into(const JsonValue& json, const Symbols& symbols, int32_t depth) {
  if (depth > kMaxDepth || terms_.size() >= kMaxTerms) json.fail("the expression is larger than any plan needs");
  if (json.is_integer()) {
    const int64_t value = json.integer(-kMaxMagnitude, kMaxMagnitude);
    terms_.push_back({Op::kConstant, value});
    return {value, value};
  }
  if (json.is_string()) return parse_symbol(json, symbols);
  if (!json.is_array() || json.array_size() != 3)
    json.fail("is no expression: expected an integer, a symbol or [op, a, b]");
  static const std::map<std::string, Op> kOps = {
      {"add", Op::kAdd},           {"sub", Op::kSub}, {"mul", Op::kMul}, {"floordiv", Op::kFloorDiv},
      {"floormod", Op::kFloorMod}, {"min", Op::kMin}, {"max", Op::kMax}};
  const Op op = kOps.at(json[0].choice({"add", "sub", "mul", "floordiv", "floormod", "min", "max"}));
  const Interval a = parse_into(json[1], symbols, depth + 1);
  const Interval b = parse_into(json[2], symbols, depth + 1);
  if ((op == Op::kFloorDiv || op == Op::kFloorMod) && b.low <= 0) json[2].fail("the divisor may be 0 or less");
  Interval range;
  if (!combine(op, a, b, &range)) json.fail("the value may be larger than 2^48");
  if (terms_.size() >= kMaxTerms) json.fail("the expression is larger than any plan needs");
  terms_.push_back({op, 0});
  return range;
}

int64_t Expression::evaluate(const SymbolValues& values) const {
  std::array<int64_t, kMaxTerms> stack;
  size_t top = 0;
  for (const Term& term : terms_) {
    switch (term.op) {
      case Op::kConstant: stack[top++] = term.value; break;
      case Op::kN: stack[top++] = values.n; break;
      case Op::kPosition: stack[top++] = values.position; break;
      case Op::kContext: stack[top++] = values.context; break;
      case Op::kScalar: stack[top++] = values.scalars[static_cast<size_t>(term.value)]; break;
      default: --top; stack[top - 1] = apply(term.op, stack[top - 1], stack[top]);
    }
  }
  return top == 1 ? stack[0] : 0;
}

bool Expression::uses(Op symbol) const {
  return std::any_of(terms_.begin(), terms_.end(), [symbol](const Term& term) { return term.op == symbol; });
}

}  // namespace cfmoe
