// Lets one call at a time work with an engine, and between two tokens of it the caller's own code on that call's
// thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "error.h"

namespace cfmoe {

class TurnGate {
 public:
  // A call begins. Waits for a trim to end; throws cfmoe::Error where another call is under way.
  void enter() {
    for (;;) {
      State state = State::kIdle;
      if (state_.compare_exchange_strong(state, State::kCall)) return;
      if (state == State::kCall) {
        throw Error("the engine is at work in another call: wait until that returns, or open an engine of its own");
      }
      state_.wait(State::kTrim);
    }
  }
  // A trim begins, unless anything is under way.
  bool try_enter_trim() {
    State state = State::kIdle;
    return state_.compare_exchange_strong(state, State::kTrim);
  }
  void leave() {
    state_ = State::kIdle;
    state_.notify_all();
  }

  // While it exists, code of the caller's runs inside a call, between two tokens.
  class Pause {
   public:
    explicit Pause(TurnGate& gate) : gate_(gate) { gate_.paused_ = std::this_thread::get_id(); }
    ~Pause() { gate_.paused_ = std::thread::id(); }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    TurnGate& gate_;
  };
  // Whether this thread is in such code.
  bool paused_here() const { return paused_.load() == std::this_thread::get_id(); }

 private:
  enum class State : uint8_t { kIdle, kCall, kTrim };
  std::atomic<State> state_{State::kIdle};
  std::atomic<std::thread::id> paused_{};
};

}  // namespace cfmoe
