// Sampling with a generator and sums of our own.
#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>

#include "engine/exponential.h"
#include "error.h"

namespace cfmoe {
namespace {

// The largest that is a number, or minus infinity.
float largest(std::span<const float> values) {
  // Side by side, for the compiler's vectors.
  float lanes[32];
  std::fill(std::begin(lanes), std::end(lanes), -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + std::size(lanes) <= values.size(); i += std::size(lanes)) {
    for (size_t j = 0; j < std::size(lanes); ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  for (; i < values.size(); ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  float best = lanes[0];
  for (const float lane : lanes) best = lane > best ? lane : best;
  return best;
}

uint64_t rotate_left(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// A strict total order, so that sorting has one result.
bool before(const Sampler::Candidate& a, const Sampler::Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

[[noreturn]] void no_number() {
  throw Error(ErrorKind::kInternal, "no logit of the model is a number: the artifact or its weights are faulty");
}

[[noreturn]] void refuse(const char* option, double value, const char* allowed) {
  throw Error(std::string(option) + " is " + std::to_string(value) + ": use " + allowed);
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
  if (!std::isfinite(options.temperature) || options.temperature < 0) {
    refuse("the temperature", options.temperature, "0 (greedy) or a positive number");
  }
  if (options.top_k < 0) refuse("top-k", options.top_k, "0 (off) or a positive number");
  if (!(options.top_p > 0 && options.top_p <= 1)) refuse("top-p", options.top_p, "a number above 0, at most 1 (off)");
  if (!std::isfinite(options.repetition_penalty) || options.repetition_penalty <= 0) {
    refuse("the repetition penalty", options.repetition_penalty, "a positive number (1: off)");
  }
}

Random::Random(uint64_t seed) {
  for (uint64_t& word : state_) {
    seed += 0x9e3779b97f4a7c15U;
    uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    word = z ^ (z >> 31);
  }
}

uint64_t Random::next() {
  const uint64_t result = rotate_left(state_[1] * 5, 7) * 9;
  const uint64_t shifted = state_[1] << 17;
  state_[2] ^= state_[0];
  state_[3] ^= state_[1];
  state_[1] ^= state_[2];
  state_[0] ^= state_[3];
  state_[2] ^= shifted;
  state_[3] = rotate_left(state_[3], 45);
  return result;
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

Sampler::Sampler(const SamplingOptions& options, std::span<Candidate> candidates)
    : options_(options), candidates_(candidates), random_(options.seed) {
  check_sampling(options);
}

int32_t Sampler::sample(std::span<float> logits, std::span<const uint8_t> seen) {
  if (options_.repetition_penalty != 1.0F) {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (seen[i] == 0) continue;
      logits[i] = logits[i] > 0 ? logits[i] / options_.repetition_penalty : logits[i] * options_.repetition_penalty;
    }
  }
  const int32_t size = static_cast<int32_t>(logits.size());
  if (options_.temperature == 0) {
    const float best = largest(logits);
    for (int32_t i = 0; i < size; ++i) {
      if (logits[i] == best) return i;
    }
    no_number();
  }
  size_t count = 0;
  for (int32_t i = 0; i < size; ++i) {
    if (!std::isnan(logits[i])) candidates_[count++] = {logits[i], i};
  }
  if (count == 0) no_number();
  std::span<Candidate> chosen = candidates_.first(count);
  if (options_.top_k > 0 && static_cast<size_t>(options_.top_k) < count) {
    std::nth_element(chosen.begin(), chosen.begin() + options_.top_k - 1, chosen.end(), before);
    chosen = chosen.first(static_cast<size_t>(options_.top_k));
    std::sort(chosen.begin(), chosen.end(), before);
  }
  return draw(chosen);
}

int32_t Sampler::draw(std::span<Candidate> chosen) {
  const Candidate top = *std::min_element(chosen.begin(), chosen.end(), before);
  if (std::isinf(top.logit)) return top.id;
  const double inverse = 1.0 / static_cast<double>(options_.temperature);
  const auto weight = [&](const Candidate& c) {
    return exponential((static_cast<double>(c.logit) - static_cast<double>(top.logit)) * inverse);
  };
  double total = 0;
  for (const Candidate& c : chosen) total += weight(c);
  if (options_.top_p < 1) {
    // A heap: few of a large vocabulary are needed in order. They gather at the end, the likeliest last.
    const auto after = [](const Candidate& a, const Candidate& b) { return before(b, a); };
    std::make_heap(chosen.begin(), chosen.end(), after);
    const double wanted = static_cast<double>(options_.top_p) * total;
    double kept = 0;
    size_t count = 0;
    while (count < chosen.size() && (count == 0 || kept < wanted)) {
      std::pop_heap(chosen.begin(), chosen.end() - static_cast<ptrdiff_t>(count), after);
      ++count;
      kept += weight(chosen[chosen.size() - count]);
    }
    chosen = chosen.last(count);
    total = kept;
  }
  double left = random_.uniform() * total;
  for (const Candidate& c : chosen) {
    left -= weight(c);
    if (left < 0) return c.id;
  }
  // Rounding can leave a remainder, which the likeliest takes.
  return top.id;
}

}  // namespace cfmoe
