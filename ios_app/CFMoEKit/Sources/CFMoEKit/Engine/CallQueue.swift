// The engine belongs to one thread at a time: calls run here one after the other. Short ones that the C API allows in a token callback do
// not wait for the
// end of a generation.
import Foundation

final class CallQueue: Sendable {
  private struct State {
    var generations = 0  // asked for and not yet at their end
    var between: [@Sendable () -> Void] = []
  }

  // A generation keeps its thread for minutes, which a thread of Swift's own pool must not.
  private let queue = DispatchQueue(label: "cfmoe.engine", qos: .userInitiated)
  private let state = Locked(State())

  /// Runs `body` after all calls before it.
  func run<Result: Sendable>(_ body: @escaping @Sendable () throws -> Result) async throws -> Result {
    try await withCheckedThrowingContinuation { continuation in
      queue.async { continuation.resume(with: Swift.Result { try body() }) }
    }
  }

  /// Runs `body` after all calls before it, or between two tokens of the generation that runs.
  func runBetweenTokens<Result: Sendable>(_ body: @escaping @Sendable () throws -> Result) async throws -> Result {
    try await withCheckedThrowingContinuation { continuation in
      let job: @Sendable () -> Void = { continuation.resume(with: Swift.Result { try body() }) }
      let waits = state.with { state in
        guard state.generations > 0 else { return false }
        state.between.append(job)
        return true
      }
      if !waits { queue.async(execute: job) }
    }
  }

  /// Runs a generation, which calls `serveBetweenTokens` in its token callback.
  func generate(_ body: @escaping @Sendable () -> Void) {
    state.with { $0.generations += 1 }
    queue.async { [self] in
      body()
      let left = state.with { state in
        state.generations -= 1
        defer { state.between = [] }
        return state.between
      }
      left.forEach { $0() }
    }
  }

  func serveBetweenTokens() {
    let jobs = state.with { state in
      defer { state.between = [] }
      return state.between
    }
    jobs.forEach { $0() }
  }
}
