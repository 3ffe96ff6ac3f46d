// Sessions: chunked prefill, hand-over, then one token at a time.
#include "engine/session.h"

#include <algorithm>
#include <chrono>

#include "error.h"

namespace cfmoe {
namespace {

constexpr uint64_t kFirstTokens = 32;

// Adds the time until it ends to `seconds`, also where an exception ends it.
class Stopwatch {
 public:
  explicit Stopwatch(double* seconds) : seconds_(seconds), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace

Session::Session(Engine& engine) : engine_(engine) {
  if (engine_.has_session().exchange(true)) {
    throw Error("the engine already has a session, and one KV cache: close that session or reset it");
  }
  try {
    reset();
  } catch (...) {
    engine_.has_session() = false;
    throw;
  }
}

Session::~Session() { engine_.has_session() = false; }

void Session::reset() {
  const Engine::Turn turn(engine_);
  engine_.cache().begin_conversation();
  forget(0);
  begin_metrics();
}

void Session::rewind(uint32_t position) {
  const Engine::Turn turn(engine_);
  if (position > this->position()) {
    throw Error("the conversation has " + std::to_string(this->position()) + " tokens and cannot go back to " +
                std::to_string(position) + ": name an earlier position");
  }
  if (position < this->position()) {
    engine_.cache().rewind(position);
    forget(position);
  }
  if (position == 0) begin_metrics();
}

// What is left of the cache beyond `position` is overwritten before anything reads it.
void Session::forget(uint32_t position) {
  position_ = position;
  pending_ = -1;
  hand_over_due_ = false;
  read_.resize(position);
  std::fill(engine_.seen().begin(), engine_.seen().end(), uint8_t{0});
  for (const int32_t token : read_) engine_.seen()[token] = 1;
}

void Session::begin_metrics() {
  engine_.cache().reset_metrics();
  engine_.cache().take_events();
  metrics_ = {};
  events_.clear();
  events_taken_ = 0;
}

void Session::check_cancelled() const {
  if (engine_.cancelled().load(std::memory_order_relaxed)) throw Error(ErrorKind::kCancelled, "cancelled");
}

void Session::begin(std::span<const int32_t> tokens) {
  const int32_t vocabulary = engine_.model().vocab_size;
  if (tokens.empty()) throw Error("the prompt has no tokens: give at least one");
  for (const int32_t token : tokens) {
    if (token < 0 || token >= vocabulary) {
      throw Error("token " + std::to_string(token) + " is outside the model's vocabulary, 0 to " +
                  std::to_string(vocabulary - 1) + ": use the artifact's own tokenizer");
    }
  }
  const uint64_t context = engine_.context_size();
  if (tokens.size() > context - std::min<uint64_t>(context, position())) {
    const auto largest = static_cast<uint64_t>(engine_.model().context_size);
    std::string message = "the prompt has " + std::to_string(tokens.size()) + " tokens";
    if (position() > 0) message += " and the conversation so far " + std::to_string(position());
    message += ", more than the context of " + std::to_string(context) + " holds: shorten the prompt";
    if (position() > 0) message += " or reset the session";
    if (context < largest)
      message += ", or raise --context-size (the model's limit is " + std::to_string(largest) + ")";
    throw Error(message);
  }
  engine_.cancelled() = false;
}

void Session::note_read(std::span<const int32_t> tokens) {
  position_ += static_cast<int64_t>(tokens.size());
  pending_ = -1;
  read_.insert(read_.end(), tokens.begin(), tokens.end());
  for (const int32_t token : tokens) engine_.seen()[token] = 1;
}

void Session::prefill(std::span<const int32_t> tokens, OutputRows rows, const TakeHidden& take) {
  std::vector<int32_t> all;
  const size_t skipped = pending_ >= 0 ? 1 : 0;
  if (skipped > 0) all.push_back(pending_);
  all.insert(all.end(), tokens.begin(), tokens.end());
  const auto hidden_size = static_cast<size_t>(engine_.model().hidden_size);
  for (size_t start = 0; start < all.size();) {
    check_cancelled();
    const auto chunk = std::span<const int32_t>(all).subspan(
        start, std::min(all.size() - start, static_cast<size_t>(engine_.chunk())));
    hand_over_due_ = true;
    const bool last = start + chunk.size() == all.size();
    const OutputRows here = rows == OutputRows::kLast && !last ? OutputRows::kNone : rows;
    const std::span<const float> hidden = engine_.prefill(chunk, position_, here);
    note_read(chunk);
    metrics_.prefill.tokens += chunk.size();
    const size_t hide = start == 0 ? skipped : 0;
    if (here == OutputRows::kAll && chunk.size() > hide) {
      take(hidden.subspan(hide * hidden_size), start + hide - skipped);
    } else if (here == OutputRows::kLast) {
      take(hidden, all.size() - 1 - skipped);
    }
    start += chunk.size();
  }
}

std::span<float> Session::decode(int32_t token, bool logits) {
  check_cancelled();
  if (hand_over_due_) {
    engine_.cache().hand_over();
    hand_over_due_ = false;
  }
  const PhaseMetrics before = engine_.cache().metrics(Phase::kDecode);
  const std::span<float> out = engine_.decode(token, position_, logits);
  const PhaseMetrics after = engine_.cache().metrics(Phase::kDecode);
  note_read({&token, 1});
  if (metrics_.decode.tokens++ < kFirstTokens) {
    metrics_.first_32_hits += after.hits - before.hits;
    metrics_.first_32_accesses += after.hits + after.misses - before.hits - before.misses;
  }
  return out;
}

void Session::generate(std::span<const int32_t> tokens, uint32_t max_new_tokens, const SamplingOptions& sampling,
                       std::span<const int32_t> stop_tokens, const TakeToken& take) {
  const Engine::Turn turn(engine_);
  Sampler sampler(sampling, engine_.candidates());
  begin(tokens);
  const PoolScope scope(engine_.pool());
  std::span<float> logits;
  {
    const Stopwatch time(&metrics_.prefill.seconds);
    std::span<const float> last;
    prefill(tokens, OutputRows::kLast, [&](std::span<const float> hidden, size_t) { last = hidden; });
    engine_.cache().hand_over();
    hand_over_due_ = false;
    if (max_new_tokens > 0) logits = engine_.head(last);
  }
  for (uint32_t count = 0; count < max_new_tokens; ++count) {
    if (count > 0) {
      if (position_ >= static_cast<int64_t>(engine_.context_size())) return;
      const Stopwatch time(&metrics_.decode.seconds);
      logits = decode(pending_, true);
    }
    check_cancelled();
    const int32_t token = sampler.sample(logits, engine_.seen());
    if (std::find(stop_tokens.begin(), stop_tokens.end(), token) != stop_tokens.end()) return;
    pending_ = token;
    engine_.seen()[token] = 1;
    const TurnGate::Pause pause(engine_.gate());
    if (!take(token)) return;
  }
}

void Session::feed(std::span<const int32_t> tokens, bool decode_program, float* logits) {
  const Engine::Turn turn(engine_);
  begin(tokens);
  const PoolScope scope(engine_.pool());
  const auto hidden_size = static_cast<size_t>(engine_.model().hidden_size);
  const auto vocabulary = static_cast<size_t>(engine_.model().vocab_size);
  const bool wanted = logits != nullptr;
  if (!decode_program) {
    const Stopwatch time(&metrics_.prefill.seconds);
    prefill(tokens, wanted ? OutputRows::kAll : OutputRows::kNone, [&](std::span<const float> hidden, size_t token) {
      for (size_t row = 0; row < hidden.size() / hidden_size; ++row) {
        const std::span<const float> from = engine_.head(hidden.subspan(row * hidden_size, hidden_size));
        std::copy(from.begin(), from.end(), logits + (token + row) * vocabulary);
      }
    });
    return;
  }
  const Stopwatch time(&metrics_.decode.seconds);
  if (pending_ >= 0) decode(pending_, false);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const std::span<const float> from = decode(tokens[i], wanted);
    std::copy(from.begin(), from.end(), logits + i * vocabulary);
  }
}

void Session::write_trace(const std::string& path) const {
  if (engine_.recorder() == nullptr) throw Error("the engine records no trace: open it with record_trace");
  cfmoe::write_trace(engine_.recorder()->trace(), path);
}

size_t Session::take_events(std::span<AccessEvent> out) {
  if (events_taken_ == events_.size()) {
    events_ = engine_.cache().take_events();
    events_taken_ = 0;
  }
  const size_t count = std::min(out.size(), events_.size() - events_taken_);
  std::copy_n(events_.begin() + static_cast<ptrdiff_t>(events_taken_), count, out.begin());
  events_taken_ += count;
  return count;
}

}  // namespace cfmoe
