// Chooses each token's experts from the router's logits.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace cfmoe {

class ThreadPool;

struct RouterOptions {
  bool sigmoid = false;  // else softmax
  int32_t experts = 0;
  int32_t top_k = 0;
  bool renormalise = false;
  float scale = 1.0F;
};

// Only experts of the `top` groups with the highest single scores are chosen; `count` divides the number of experts.
struct RouterGroups {
  int32_t count = 1;
  int32_t top = 1;
};

class Router {
 public:
  // `kept` is room for the scores of `kept.size() / experts` tokens, or empty. Many tokens are shared among the threads
  // of `pool`, which must outlive the router.
  Router(const RouterOptions& options, std::span<uint16_t> kept, ThreadPool* pool = nullptr);

  // logits [n, stride], of which the first `experts` of a row count; ids [n, top_k] by descending score (ties: the
  // lower id; a score that is not a number comes last); weights [n, top_k]. The experts of the chosen groups must be
  // top_k or more.
  void route(const float* logits, int64_t n, int64_t stride, int32_t* ids, float* weights,
             const RouterGroups& groups = {});

  // The scores of the last route's tokens, [n, experts] in units of 1/65535, those of groups that were not chosen
  // among them; empty unless they are kept. Whole numbers, so that a cache policy sees the same from a trace.
  std::span<const uint16_t> kept_scores() const { return kept_.first(kept_count_); }

 private:
  // What one thread works with.
  struct Row {
    std::vector<float> scores;
    std::vector<float> best;      // per group
    std::vector<int32_t> ranked;  // groups by score
  };
  void route_token(Row& row, const float* logits, int64_t token, int32_t* ids, float* weights,
                   const RouterGroups& groups);
  void score(Row& row, const float* logits) const;
  void keep(const Row& row, int64_t token);
  void mask(Row& row, const RouterGroups& groups) const;

  RouterOptions options_;
  ThreadPool* pool_;
  std::vector<Row> rows_;  // one per thread
  std::span<uint16_t> kept_;
  size_t kept_count_ = 0;
};

}  // namespace cfmoe
