"""GLSL functions behind the operations that kernels call by name, and what they ask of the device."""

from __future__ import annotations

# Names that a variable must not take: keywords and built-ins that TIR programs are likely to use.
_KEYWORDS = """
main scalars int uint float bool vec2 vec3 vec4 in out inout input output sample filter buffer shared const if else for
while do return break continue switch case default struct active half fixed common partition layout uniform readonly
writeonly restrict centroid flat smooth resource using namespace template this noinline inline volatile public static
extern external interface long short double unsigned superp cast sizeof typedef goto union enum class min max abs exp
log sqrt floor ceil round mod clamp mix step dot length any all not equal barrier
"""
RESERVED = frozenset(_KEYWORDS.split())

_DOT_EMULATED = """int dot4(int a, int b) {
  return bitfieldExtract(a, 0, 8) * bitfieldExtract(b, 0, 8) + bitfieldExtract(a, 8, 8) * bitfieldExtract(b, 8, 8)
    + bitfieldExtract(a, 16, 8) * bitfieldExtract(b, 16, 8) + bitfieldExtract(a, 24, 8) * bitfieldExtract(b, 24, 8);
}"""
# OpSDotKHR with both operands as four packed int8.
_DOT_NATIVE = """spirv_instruction(extensions = ["SPV_KHR_integer_dot_product"], capabilities = [6019, 6018], id = 4450)
int packed_dot(int a, int b, spirv_literal int format);
int dot4(int a, int b) { return packed_dot(a, b, 0); }"""
# packHalf2x16 may cut instead of rounding: caches would differ between devices.
_PACK_HALF2 = """uint half_bits(float value) {
  uint bits = floatBitsToUint(value);
  uint size = bits & 0x7fffffffu;
  uint rounded;
  if (size >= 0x47800000u) rounded = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  else if (size < 0x38800000u) rounded = uint(roundEven(uintBitsToFloat(size) * 16777216.0));
  else rounded = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  return rounded | ((bits >> 16) & 0x8000u);
}
int pack_half2(float low, float high) { return int(half_bits(low) | (half_bits(high) << 16)); }"""

_SOURCES = {
    "floor_div": "int floor_div(int a, int b) { int q = a / b; return ((a ^ b) < 0 && q * b != a) ? q - 1 : q; }",
    "floor_mod": "int floor_mod(int a, int b) { int r = a - (a / b) * b; return (r != 0 && (r ^ b) < 0) ? r + b : r; }",
    # Four signed bytes of each, exact.
    "dot4": _DOT_EMULATED,
    # The two halves of a word, as fp32.
    "unpack_half2": "vec2 unpack_half2(int word) { return unpackHalf2x16(uint(word)); }",
    "pack_half2": _PACK_HALF2,
    "shuffle_xor": "float shuffle_xor(float value, int mask) { return subgroupShuffleXor(value, uint(mask)); }",
}
_EXTENSIONS = {"shuffle_xor": ["GL_KHR_shader_subgroup_shuffle"]}
NAMES = frozenset(_SOURCES)
CONVERGENT = frozenset({"shuffle_xor"})  # what every invocation of a subgroup must reach together


def source(name: str, features: frozenset[str]) -> str:
    if name == "dot4" and "integer_dot" in features:
        return _DOT_NATIVE
    return _SOURCES[name]


def extensions(name: str, features: frozenset[str]) -> list[str]:
    if name == "dot4" and "integer_dot" in features:
        return ["GL_EXT_spirv_intrinsics"]
    return _EXTENSIONS.get(name, [])


def features(name: str) -> list[str]:
    """The features that a helper uses where the target has them."""
    return {"dot4": ["integer_dot"], "shuffle_xor": ["subgroup_shuffle"]}.get(name, [])
