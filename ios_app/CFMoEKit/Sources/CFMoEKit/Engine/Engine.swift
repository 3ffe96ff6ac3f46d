// An opened artifact inside a memory budget.
import CCFMoE
import Foundation

/// May be used from any thread. The engine works on a thread of its own; what waits for it is async.
public final class Engine: Sendable {
  struct Handles {
    var engine: OpaquePointer?
    var session: OpaquePointer?
    var sessionNumber = 0
    var running: GenerationControl?
  }

  public let model: ModelInfo
  public let artifact: URL
  let calls = CallQueue()
  // Held while a handle is used from any thread, and while one is closed: never during a generation.
  let handles: Locked<Handles>

  /// Takes as long as reading the weights does: `open` does it on another thread. Throws what the artifact, the budget or an option is at
  /// fault for.
  public init(artifact: URL, options: EngineOptions = EngineOptions()) throws {
    guard cfmoe_abi_version() == UInt32(CFMOE_ABI_VERSION) else {
      throw CFMoEError.fault(
        "the engine has ABI version \(cfmoe_abi_version()), this app needs \(CFMOE_ABI_VERSION): build both from one source")
    }
    var engine: OpaquePointer?
    var c = cfmoe_engine_options()
    cfmoe_engine_options_init(&c)
    (c.budget_bytes, c.expert_percent) = options.budget.arguments
    c.context_size = options.contextSize
    c.threads = options.threads
    try artifact.path.withCString { path in
      try withOptionalCString(options.policy) { policy in
        c.policy = policy
        try options.placement.prefill.rawValue.withCString { prefill in
          try options.placement.decode.rawValue.withCString { decode in
            c.prefill_device = prefill
            c.decode_device = decode
            try checked { cfmoe_engine_open(path, &c, &engine, $0, $1) }
          }
        }
      }
    }
    var info = cfmoe_model_info()
    cfmoe_engine_model(engine, &info)
    model = ModelInfo(info)
    self.artifact = artifact
    handles = Locked(Handles(engine: engine))
  }

  public static func open(artifact: URL, options: EngineOptions = EngineOptions()) async throws -> Engine {
    try await withCheckedThrowingContinuation { continuation in
      DispatchQueue.global(qos: .userInitiated).async {
        continuation.resume(with: Result { try Engine(artifact: artifact, options: options) })
      }
    }
  }

  deinit { closeHandles() }

  /// Ends a running generation and gives all memory back; what is called afterwards throws.
  public func close() async {
    handles.with { handles in
      handles.running?.cancel()
      cfmoe_session_cancel(handles.session)
    }
    try? await calls.run { [self] in closeHandles() }
  }

  private func closeHandles() {
    handles.with { handles in
      cfmoe_session_destroy(handles.session)
      cfmoe_engine_close(handles.engine)
      handles = Handles(sessionNumber: handles.sessionNumber)
    }
  }

  /// Where the budget goes now.
  public func memory() throws -> Memory {
    try withEngine { engine in
      var c = cfmoe_memory()
      cfmoe_engine_memory(engine, &c)
      return Memory(c)
    }
  }

  /// Changes the budget, between two tokens while an answer is being made. Throws where it is too small, naming the smallest that works.
  @discardableResult
  public func setBudget(_ budget: MemoryBudget) async throws -> Memory {
    try await calls.runBetweenTokens { [self] in
      try withEngine { engine in
        let (bytes, percent) = budget.arguments
        try checked { cfmoe_engine_set_budget(engine, bytes, percent, $0, $1) }
      }
      return try memory()
    }
  }

  /// For low memory: shrinks the budget to so many bytes, or to the smallest that works if that is more; at once, or before the next layer.
  public func trim(to bytes: UInt64 = 0) throws {
    try withEngine { engine in try checked { cfmoe_engine_trim(engine, bytes, $0, $1) } }
  }

  public func residents() async throws -> Residents {
    try await calls.runBetweenTokens { [self] in
      try withEngine { engine in
        var flags = [UInt8](repeating: 0, count: cfmoe_engine_residents(engine, nil, 0))
        _ = cfmoe_engine_residents(engine, &flags, flags.count)
        return Residents(layers: model.moeLayers, experts: model.numExperts, flags: flags)
      }
    }
  }

  /// What "auto" became: direct, buffered or mmap.
  public func io() throws -> String { try withEngine { String(cString: cfmoe_engine_io($0)) } }
  public func policy() throws -> String { try withEngine { String(cString: cfmoe_engine_policy($0)) } }
  /// Where the phases run.
  public func placement() throws -> Placement {
    try withEngine { engine in
      let (prefill, decode) = (String(cString: cfmoe_engine_device(engine, 0)), String(cString: cfmoe_engine_device(engine, 1)))
      guard let prefill = Device(rawValue: prefill), let decode = Device(rawValue: decode) else {
        throw CFMoEError.fault("the engine runs on \(prefill) and \(decode), which this app does not know")
      }
      return Placement(prefill: prefill, decode: decode)
    }
  }
  /// Of the GPU; empty if none is used.
  public func deviceName() throws -> String { try withEngine { String(cString: cfmoe_engine_device_name($0)) } }
  /// What the user should know about how the artifact was opened; empty if nothing.
  public func warning() async throws -> String {
    try await calls.runBetweenTokens { [self] in try withEngine { String(cString: cfmoe_engine_warning($0)) } }
  }

  /// Begins a conversation with a cold cache. One at a time: throws while another is open.
  public func makeSession() async throws -> Session {
    try await calls.run { [self] in
      let engine = try withEngine { $0 }
      var session: OpaquePointer?
      try checked { cfmoe_session_create(engine, &session, $0, $1) }
      let number = handles.with { handles in
        handles.session = session
        handles.sessionNumber += 1
        return handles.sessionNumber
      }
      return Session(engine: self, number: number)
    }
  }

  func withEngine<Result>(_ body: (OpaquePointer) throws -> Result) throws -> Result {
    try handles.with { handles in
      guard let engine = handles.engine else { throw CFMoEError.user("the engine is closed: open it again") }
      return try body(engine)
    }
  }
}

func withOptionalCString<Result>(_ text: String?, _ body: (UnsafePointer<CChar>?) throws -> Result) rethrows -> Result {
  guard let text else { return try body(nil) }
  return try text.withCString { try body($0) }
}
