// A small valid plan for the artifact of fixtures.h.
#pragma once

#include <string>

namespace cfmoe::test {

inline std::string program_text(const std::string& n, const std::string& rows, const std::string& scratch_rows) {
  return R"({"workspace_bytes": 20480, "output": 4, "buffers": [
    {"kind": "input", "name": "tokens", "dtype": "int32", "shape": [)" +
         n + R"(]},
    {"kind": "weight", "name": "embedding", "dtype": "int32", "shape": [256]},
    {"kind": "k_cache", "layer": 2, "dtype": "float16", "shape": [2, ["floordiv", "context", 16], 16, 16]},
    {"kind": "v_cache", "layer": 0, "dtype": "float16", "shape": [2, "context", 16]},
    {"kind": "workspace", "offset": 0, "dtype": "float32", "shape": [)" +
         n + R"(, 64]},
    {"kind": "workspace", "offset": 4096, "dtype": "float32", "shape": [)" +
         n + R"(, 16]},
    {"kind": "workspace", "offset": 5120, "dtype": "int32", "shape": [)" +
         n + R"(, 2]},
    {"kind": "workspace", "offset": 5248, "dtype": "float32", "shape": [)" +
         n + R"(, 2]},
    {"kind": "workspace", "offset": 5376, "dtype": "int32", "shape": [)" +
         n + R"(, 32]},
    {"kind": "workspace", "offset": 7424, "dtype": "float32", "shape": [)" +
         rows + R"(, 64]},
    {"kind": "workspace", "offset": 15616, "dtype": "int32", "shape": [)" +
         scratch_rows + R"(, 16]}
  ], "steps": [
    {"op": "call", "kernel": "embedding_1", "args": [{"buffer": 0}, {"buffer": 1}, {"scalar": ["add", "position", 1]}, {"buffer": 4}]},
    {"op": "route", "layer": 1, "logits": 5, "ids": 6, "weights": 7},
    {"op": "experts", "layer": 1, "activation": 8, "ids": 6, "rows": 9, "scratch": 10}
  ]})";
}

inline std::string plan_text() {
  return R"({"version": 1, "symbols": {"n": [1, 16], "position": [0, 128], "context": [16, 128]}, "hidden_size": 64,
    "kv": {"dtype": "float16", "layers": 3, "k_shape": [2, ["floordiv", "context", 16], 16, 16], "v_shape": [2, "context", 16]},
    "experts": {"gate_up": {"prefill": "gu_p", "decode": "gu_d", "tiles": 1}, "down": {"prefill": "d_p", "decode": "d_d", "tiles": 2},
                "slab_dtypes": ["int32", "float16"]},
    "programs": {"prefill": )" +
         program_text("\"n\"", R"(["mul", "n", 2])", R"(["max", "n", 2])") + R"(, "decode": )" +
         program_text("1", "2", "2") + R"(, "head": {
      "workspace_bytes": 512, "output": 1, "buffers": [
        {"kind": "input", "name": "hidden", "dtype": "float32", "shape": [1, 64]},
        {"kind": "workspace", "offset": 64, "dtype": "float32", "shape": [1, 100]}],
      "steps": [{"op": "call", "kernel": "head", "args": [{"buffer": 0}, {"buffer": 1}]}]}}})";
}

}  // namespace cfmoe::test
