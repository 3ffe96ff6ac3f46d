// One conversation with an engine.
import CCFMoE
import Foundation

/// Whether a generation is still wanted. The C API forgets a cancellation that comes before the call begins, so it is kept here as well.
final class GenerationControl: Sendable {
  private let flag = Locked(false)
  var isCancelled: Bool { flag.with { $0 } }
  func cancel() { flag.with { $0 = true } }
}

/// Positions continue over calls until `reset`. May be used from any thread.
public final class Session: Sendable {
  private let engine: Engine
  private let number: Int
  private let wanted = Locked([GenerationControl]())

  init(engine: Engine, number: Int) {
    self.engine = engine
    self.number = number
  }

  deinit {
    // No generation runs any more: it would hold this session.
    let engine = engine
    let number = number
    Task { try? await engine.calls.run { Session.destroy(number, of: engine) } }
  }

  /// Ends the conversation, so that another can begin; what is called afterwards throws.
  public func close() async {
    cancel()
    let engine = engine
    let number = number
    try? await engine.calls.run { Session.destroy(number, of: engine) }
  }

  private static func destroy(_ number: Int, of engine: Engine) {
    engine.handles.with { handles in
      guard handles.sessionNumber == number, handles.session != nil else { return }
      cfmoe_session_destroy(handles.session)
      handles.session = nil
    }
  }

  /// Tokens of the conversation so far.
  public func position() async throws -> Int {
    try await engine.calls.runBetweenTokens { [self] in Int(cfmoe_session_position(try handle())) }
  }

  public func metrics() async throws -> Metrics {
    try await engine.calls.runBetweenTokens { [self] in try currentMetrics() }
  }

  /// Forgets the conversation and makes the cache cold.
  public func reset() async throws {
    try await engine.calls.run { [self] in
      let session = try handle()
      try checked { cfmoe_session_reset(session, $0, $1) }
    }
  }

  /// Forgets what follows the first `position` tokens of the conversation; experts stay in memory. 0 begins a new conversation.
  public func rewind(to position: Int) async throws {
    try await engine.calls.run { [self] in
      let session = try handle()
      try checked { cfmoe_session_rewind(session, UInt32(clamping: position), $0, $1) }
    }
  }

  /// Ends what was asked for so far: those streams end with `.done` and the reason `.cancelled`.
  public func cancel() {
    wanted.with { $0.forEach { $0.cancel() } }
    interrupt { _ in true }
  }

  /// Reads `tokens` and streams up to `maxNewTokens` new ones, with text if a tokenizer is given, then `.done`. Whoever stops reading the
  /// stream cancels it.
  /// stopTokens: nil for the model's own, empty for none. Throws into the stream where the prompt is empty, does not fit the context or
  /// holds unknown tokens.
  public func generate(
    _ tokens: [Int32], maxNewTokens: Int, sampling: Sampling = .greedy, stopTokens: [Int32]? = nil, tokenizer: Tokenizer? = nil
  ) -> AsyncThrowingStream<GenerationEvent, any Error> {
    let control = GenerationControl()
    wanted.with { $0.append(control) }
    return AsyncThrowingStream { continuation in
      continuation.onTermination = { [weak self] end in
        guard case .cancelled = end else { return }
        control.cancel()
        self?.interrupt { $0 === control }
      }
      engine.calls.generate { [self] in
        let call = GenerationCall(control: control, calls: engine.calls, tokenizer: tokenizer, continuation: continuation)
        do {
          let done = try run(call, tokens, maxNewTokens, sampling, stopTokens)
          continuation.yield(.done(done))
          continuation.finish()
        } catch {
          continuation.finish(throwing: error)
        }
        wanted.with { $0.removeAll { $0 === control } }
      }
    }
  }

  /// Cancels the call that runs if it is the one that is meant.
  private func interrupt(_ isMeant: (GenerationControl) -> Bool) {
    engine.handles.with { handles in
      guard handles.sessionNumber == number, let running = handles.running, isMeant(running) else { return }
      cfmoe_session_cancel(handles.session)
    }
  }

  private func run(
    _ call: GenerationCall, _ tokens: [Int32], _ maxNewTokens: Int, _ sampling: Sampling, _ stopTokens: [Int32]?
  ) throws -> Generation {
    guard (0...Int(Int32.max)).contains(maxNewTokens) else {
      throw CFMoEError.user("\(maxNewTokens) new tokens are not allowed: use 0 or a positive number")
    }
    let session = try handle()
    engine.handles.with { $0.running = call.control }
    defer { engine.handles.with { $0.running = nil } }
    _ = try call.tokenizer?.finish()
    var count: UInt32 = 0
    var cancelled = call.control.isCancelled
    if !cancelled {
      var c = sampling.c
      // A pointer even where there are none: NULL means the model's own.
      let stops = stopTokens.map { $0 + [0] }
      do {
        try withExtendedLifetime(call) {
          try checked { line, size in
            cfmoe_session_generate(
              session, tokens, UInt32(tokens.count), UInt32(maxNewTokens), &c, stops, UInt32(stopTokens?.count ?? 0),
              { token, user in Unmanaged<GenerationCall>.fromOpaque(user!).takeUnretainedValue().onToken(token) },
              Unmanaged.passUnretained(call).toOpaque(), nil, &count, line, size)
          }
        }
      } catch CFMoEError.cancelled {
        cancelled = true
      }
    }
    if let failure = call.failure { throw failure }
    let position = Int(cfmoe_session_position(session))
    let reason: FinishReason =
      cancelled || call.control.isCancelled
      ? .cancelled : call.newTokens == maxNewTokens ? .length : position > engine.model.contextSize ? .context : .stop
    return Generation(
      reason: reason, promptTokens: tokens.count, newTokens: call.newTokens, rest: try call.tokenizer?.finish(), position: position,
      metrics: try currentMetrics(), memory: try engine.memory())
  }

  /// On the engine's thread only.
  private func handle() throws -> OpaquePointer {
    try engine.handles.with { handles in
      guard handles.sessionNumber == number, let session = handles.session else {
        throw CFMoEError.user("the conversation is closed: begin another")
      }
      return session
    }
  }

  private func currentMetrics() throws -> Metrics {
    var c = cfmoe_metrics()
    cfmoe_session_metrics(try handle(), &c)
    return Metrics(c)
  }
}

/// What the token callback of one generation needs; used on the engine's thread only.
private final class GenerationCall {
  let control: GenerationControl
  let tokenizer: Tokenizer?
  private(set) var newTokens = 0
  private(set) var failure: (any Error)?
  private let calls: CallQueue
  private let continuation: AsyncThrowingStream<GenerationEvent, any Error>.Continuation

  init(
    control: GenerationControl, calls: CallQueue, tokenizer: Tokenizer?,
    continuation: AsyncThrowingStream<GenerationEvent, any Error>.Continuation
  ) {
    self.control = control
    self.calls = calls
    self.tokenizer = tokenizer
    self.continuation = continuation
  }

  func onToken(_ token: Int32) -> Int32 {
    newTokens += 1
    do {
      continuation.yield(.token(Token(id: token, text: try tokenizer?.push(token))))
    } catch {
      failure = error
      return 1
    }
    calls.serveBetweenTokens()
    return control.isCancelled ? 1 : 0
  }
}
