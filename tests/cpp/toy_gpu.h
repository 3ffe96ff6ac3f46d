// The toy model of test_kernels.cc as a GPU's plan and kernels for the fake device.
#pragma once

#include <map>
#include <string>

#include "fake_device.h"
#include "fixtures.h"
#include "plan_fixture.h"

namespace cfmoe::test {

inline std::string gpu_kernel(const std::string& name, int buffers, int scalars, const std::string& writes) {
  return "\"" + name + "\": {\"code\": [0, 4], \"entry\": \"" + name +
         "\", \"local\": [32, 1, 1], \"grid\": [1, 1, 1], \"buffers\": " + std::to_string(buffers) +
         ", \"scalars\": " + std::to_string(scalars) + ", \"writes\": " + writes + "}";
}

inline std::string gpu_program_text(bool decode) {
  std::string text = program_text(decode);
  const std::string n = decode ? "1" : "\"n\"", all = decode ? "2" : "[\"mul\", \"n\", 2]";
  const auto every = [&text](const std::string& from, const std::string& to) {
    for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
      text.replace(at, from.size(), to);
  };
  if (!decode) every("[[\"max\", \"n\", 2], 16]", "[" + all + ", 16]");
  every("\"workspace_bytes\": 16640", "\"workspace_bytes\": 17664");
  every("{\"buffer\": 0}, {\"buffer\": 1}, {\"buffer\": 2}]",
        "{\"buffer\": 0}, {\"buffer\": 1}, {\"buffer\": 2}, {\"scalar\": " + n + "}]");
  every("{\"scalar\": \"position\"}]", "{\"scalar\": \"position\"}, {\"scalar\": " + n + "}]");
  every("{\"buffer\": 3}, {\"buffer\": 6}]", "{\"buffer\": 3}, {\"buffer\": 6}, {\"scalar\": " + n + "}]");
  every("{\"buffer\": 5}, {\"buffer\": 2}]", "{\"buffer\": 5}, {\"buffer\": 2}, {\"scalar\": " + n + "}]");
  return text;
}

inline std::string gpu_plan_text() {
  std::string text = plan_text();
  const size_t programs = text.find("\"programs\"");
  const std::string kernels = gpu_kernel("embed", 3, 1, "[2]") + ", " + gpu_kernel("attend", 3, 2, "[0, 1, 2]") + ", " +
                              gpu_kernel("route_logits", 3, 1, "[1, 2]") + ", " + gpu_kernel("gate_up", 5, 3, "[3]") +
                              ", " + gpu_kernel("down", 5, 3, "[3]") + ", " + gpu_kernel("combine", 3, 1, "[2]") +
                              ", " + gpu_kernel("head", 2, 0, "[1]");
  const std::string head = text.substr(text.find("\"head\": {\"workspace_bytes\""));
  text = text.substr(0, programs) + "\"alignment\": 512, \"kernels\": {" + kernels +
         "}, \"programs\": {\"prefill\": " + gpu_program_text(false) + ", \"decode\": " + gpu_program_text(true) +
         ", " + head;
  return replaced(text, "[\"int32\", \"float16\"]", "[\"int32\"]");
}

// The artifact of toy_artifact.h with a target for the fake device.
class ToyGpuArtifact {
 public:
  explicit ToyGpuArtifact(const std::string& plan = gpu_plan_text(), const std::string& features = "[\"float16\"]") {
    std::map<std::string, std::string> files = artifact_contents();
    files["lib/host/kernels.so"] = read_file(CFMOE_TEST_KERNELS);
    files["lib/host/plan.json"] = plan_text();
    files["lib/metal-generic/kernels.metal"] = "code";
    files["lib/metal-generic/plan.json"] = plan;
    for (const auto& [name, bytes] : files) write_file(directory_ / name, bytes);
    write_file(directory_ / "manifest.json",
               seal(replaced(manifest_text(files), "\"targets\": {",
                             "\"targets\": {\"metal-generic\": {\"device\": \"metal\", \"arch\": \"generic\", "
                             "\"features\": " +
                                 features +
                                 ", \"library\": \"lib/metal-generic/kernels.metal\", \"plan\": "
                                 "\"lib/metal-generic/plan.json\"}, ")));
  }
  const std::string& path() const { return directory_.path(); }

 private:
  TempDir directory_;
};

}  // namespace cfmoe::test
