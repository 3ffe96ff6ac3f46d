// One conversation: what it has seen, what it generates, and what that cost.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"

namespace cfmoe {

struct PhaseCost {
  uint64_t tokens = 0;
  double seconds = 0;
};

struct SessionMetrics {
  PhaseCost prefill, decode;  // since the session began or was reset
  uint64_t first_32_hits = 0, first_32_accesses = 0;
};

class Session {
 public:
  // Throws cfmoe::Error where the engine already has a session. Begins with a cold cache.
  explicit Session(Engine& engine);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Prefills `tokens`, then generates at most `max_new_tokens`, until a stop token, the end of the context, or a `take`
  // that returns false. `take` gets each new token before the next is computed. Throws cfmoe::Error; what was taken
  // until then stays part of the conversation.
  using TakeToken = std::function<bool(int32_t)>;
  void generate(std::span<const int32_t> tokens, uint32_t max_new_tokens, const SamplingOptions& sampling,
                std::span<const int32_t> stop_tokens, const TakeToken& take);
  // Feeds tokens and writes the logits behind each, [tokens, vocabulary], unless `logits` is null.
  void feed(std::span<const int32_t> tokens, bool decode, float* logits);
  void reset();
  // Forgets what follows the first `position` tokens; experts stay in memory. At 0 a new conversation begins, metrics
  // too. Throws cfmoe::Error where there are fewer tokens.
  void rewind(uint32_t position);
  // From any thread: the call under way throws cfmoe::Error (cancelled) soon.
  void cancel() { engine_.cancelled() = true; }

  // Tokens of the conversation so far, generated ones included.
  uint32_t position() const { return static_cast<uint32_t>(position_) + (pending_ >= 0 ? 1 : 0); }
  const SessionMetrics& metrics() const { return metrics_; }
  Engine& engine() const { return engine_; }
  size_t take_events(std::span<AccessEvent> out);
  // All that the engine has run since it was opened, samples apart. Throws cfmoe::Error where it records none.
  void write_trace(const std::string& path) const;

 private:
  // Hidden states of the chunk's tokens, and where its first lies among all of `tokens`.
  using TakeHidden = std::function<void(std::span<const float>, size_t)>;

  void begin(std::span<const int32_t> tokens);
  // `rows`: which of the tokens' hidden states are wanted at all; kLast of the last chunk alone.
  void prefill(std::span<const int32_t> tokens, OutputRows rows, const TakeHidden& take);
  std::span<float> decode(int32_t token, bool logits);
  void note_read(std::span<const int32_t> tokens);
  void forget(uint32_t position);
  void begin_metrics();
  void check_cancelled() const;

  Engine& engine_;
  int64_t position_ = 0;       // tokens whose keys and values are in the cache
  std::vector<int32_t> read_;  // those tokens
  int32_t pending_ = -1;       // the last generated token, which nothing has read yet
  bool hand_over_due_ = false;
  SessionMetrics metrics_;
  std::vector<AccessEvent> events_;
  size_t events_taken_ = 0;
};

}  // namespace cfmoe
