// A small valid plan for the artifact of fixtures.h and the kernels of test_kernels.cc.
#pragma once

#include <string>

namespace cfmoe::test {

inline std::string program_text(bool decode) {
  const std::string n = decode ? "1" : "\"n\"", rows = decode ? "2" : "[\"mul\", \"n\", 2]",
                    most = decode ? "2" : "[\"max\", \"n\", 2]";
  std::string buffers = R"([{"kind": "input", "name": "tokens", "dtype": "int32", "shape": [)" + n + R"(]},
    {"kind": "weight", "name": "embedding", "dtype": "int32", "shape": [256]},
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
                        most + R"(, 16]})";
  std::string steps = R"([{"op": "call", "kernel": "embed", "args": [{"buffer": 0}, {"buffer": 1}, {"buffer": 2}]})";
  for (int layer = 0; layer < 2; ++layer) {
    const std::string number = std::to_string(layer), k = std::to_string(9 + 2 * layer),
                      v = std::to_string(10 + 2 * layer);
    buffers += R"(, {"kind": "k_cache", "layer": )" + number +
               R"(, "dtype": "float16", "shape": [2, ["floordiv", "context", 16], 16, 16]})";
    buffers += R"(, {"kind": "v_cache", "layer": )" + number + R"(, "dtype": "float16", "shape": [2, "context", 16]})";
    steps += R"(, {"op": "call", "kernel": "attend", "args": [{"buffer": 2}, {"buffer": )" + k +
             "}, {\"buffer\": " + v + "}, {\"scalar\": \"position\"}]}";
    steps += R"(, {"op": "call", "kernel": "route_logits", "args": [{"buffer": 2}, {"buffer": 3}, {"buffer": 6}]})";
    steps += R"(, {"op": "route", "layer": )" + number + R"(, "logits": 3, "ids": 4, "weights": 5})";
    steps += R"(, {"op": "experts", "layer": )" + number + R"(, "activation": 6, "ids": 4, "rows": 7, "scratch": 8})";
    steps += R"(, {"op": "call", "kernel": "combine", "args": [{"buffer": 7}, {"buffer": 5}, {"buffer": 2}]})";
  }
  return R"({"workspace_bytes": 16640, "output": 2, "buffers": )" + buffers + R"(], "steps": )" + steps + "]}";
}

inline std::string plan_text() {
  return R"({"version": 1, "symbols": {"n": [1, 16], "position": [0, 128], "context": [16, 128]}, "hidden_size": 64,
    "kv": {"dtype": "float16", "layers": 3, "k_shape": [2, ["floordiv", "context", 16], 16, 16], "v_shape": [2, "context", 16]},
    "experts": {"gate_up": {"prefill": "gate_up", "decode": "gate_up", "tiles": 1}, "down": {"prefill": "down", "decode": "down", "tiles": 2},
                "slab_dtypes": ["int32", "float16"]},
    "programs": {"prefill": )" +
         program_text(false) + R"(, "decode": )" + program_text(true) +
         R"(, "head": {"workspace_bytes": 512, "output": 1, "buffers": [
        {"kind": "input", "name": "hidden", "dtype": "float32", "shape": [1, 64]},
        {"kind": "workspace", "offset": 64, "dtype": "float32", "shape": [1, 100]}],
      "steps": [{"op": "call", "kernel": "head", "args": [{"buffer": 0}, {"buffer": 1}]}]}}})";
}

}  // namespace cfmoe::test
