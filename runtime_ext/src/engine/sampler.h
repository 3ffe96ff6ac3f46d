// Chooses the next token from logits: the same token for the same logits, options and seed on every machine of one
// kind.
#pragma once

#include <cstdint>
#include <span>

namespace cfmoe {

struct SamplingOptions {
  float temperature = 0.0F;         // 0: greedy
  int32_t top_k = 0;                // 0: off
  float top_p = 1.0F;               // 1: off
  float repetition_penalty = 1.0F;  // 1: off
  uint64_t seed = 0;
};

// Throws cfmoe::Error naming the option, the value and what is allowed.
void check_sampling(const SamplingOptions& options);

// xoshiro256**, seeded through splitmix64. Standard distributions differ between libraries; this does not.
class Random {
 public:
  explicit Random(uint64_t seed);
  uint64_t next();
  // In [0, 1), 53 bits.
  double uniform();

 private:
  uint64_t state_[4];
};

class Sampler {
 public:
  struct Candidate {
    float logit;
    int32_t id;
  };

  // `candidates` is working memory for one candidate per token of the vocabulary, used unless greedy.
  Sampler(const SamplingOptions& options, std::span<Candidate> candidates);

  // `logits` [vocabulary] is changed. `seen` [vocabulary] is non-zero for the tokens of the conversation. Logits that
  // are not numbers are never chosen; throws cfmoe::Error where none is a number. Order: penalty, temperature, top-k,
  // top-p.
  int32_t sample(std::span<float> logits, std::span<const uint8_t> seen);

 private:
  int32_t draw(std::span<Candidate> chosen);

  SamplingOptions options_;
  std::span<Candidate> candidates_;
  Random random_;
};

}  // namespace cfmoe
