// The artifact of fixtures.h with the plan and the kernels of a toy model, ready to be opened.
#pragma once

#include <map>
#include <string>

#include "fixtures.h"
#include "plan_fixture.h"

namespace cfmoe::test {

class ToyArtifact {
 public:
  explicit ToyArtifact(const std::string& plan = plan_text(), const std::string& tokenizer = "{}") {
    std::map<std::string, std::string> files = artifact_contents();
    files["lib/host/kernels.so"] = read_file(CFMOE_TEST_KERNELS);
    files["lib/host/plan.json"] = plan;
    files["tokenizer.json"] = tokenizer;
    for (const auto& [name, bytes] : files) write_file(directory_ / name, bytes);
    write_file(directory_ / "manifest.json", manifest_text(files));
  }
  const std::string& path() const { return directory_.path(); }

 private:
  TempDir directory_;
};

}  // namespace cfmoe::test
