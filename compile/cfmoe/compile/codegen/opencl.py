"""OpenCL C and MSL through TVM's own generators, with the functions that kernels call by name in front."""

from __future__ import annotations

import tvm
from tvm.target import Target

_OPENCL = """\
inline int dot4(int a, int b) {
  char4 x = as_char4(a), y = as_char4(b);
  return x.s0 * y.s0 + x.s1 * y.s1 + x.s2 * y.s2 + x.s3 * y.s3;
}
inline float2 unpack_half2(int word) {
  return vload_half2(0, (const half *)&word);
}
inline int pack_half2(float low, float high) {
  int word;
  vstore_half2_rte((float2)(low, high), 0, (half *)&word);
  return word;
}
"""
_METAL = """\
#include <metal_stdlib>
using namespace metal;
static inline int dot4(int a, int b) {
  char4 x = as_type<char4>(a), y = as_type<char4>(b);
  return x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
}
static inline float2 unpack_half2(int word) {
  return float2(as_type<half2>(word));
}
static inline int pack_half2(float low, float high) {
  return as_type<int>(half2(low, high));
}
"""
_METAL_UNION = """\
union __TVMArgUnion {
 int v_int[2];
};
"""


def emit(mod: tvm.IRModule, kind: str) -> str:
    """One source with every function of `mod`, which is lowered for `kind`: opencl or metal."""
    module = tvm.get_global_func(f"target.build.{kind}")(mod, Target({"kind": kind}))
    source = str(module.inspect_source())
    # Written once per function, so that one source would define it again and again; nothing uses it.
    return {"opencl": _OPENCL, "metal": _METAL}[kind] + source.replace(_METAL_UNION, "")
