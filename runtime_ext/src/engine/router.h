// Chooses each token's experts from the router's logits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cfmoe {

struct RouterOptions {
  bool sigmoid = false;  // else softmax
  int32_t experts = 0;
  int32_t top_k = 0;
  bool renormalise = false;
  float scale = 1.0F;
};

class Router {
 public:
  explicit Router(const RouterOptions& options);

  // logits [n, stride], of which the first `experts` of a row count; ids [n, top_k] by descending score (ties: the
  // lower id; a score that is not a number comes last); weights [n, top_k].
  void route(const float* logits, int64_t n, int64_t stride, int32_t* ids, float* weights);

 private:
  void score(const float* logits);

  RouterOptions options_;
  std::vector<float> scores_;
};

}  // namespace cfmoe
