// The benchmark screen: one prompt and one answer of fixed lengths for each budget, each with an engine of its own, as `cfmoe-engine
// bench` does.
import Foundation

@MainActor
public final class BenchmarkViewModel: ViewModel<BenchmarkViewModel.State> {
  public struct State: Equatable, Sendable {
    public var isRunning = false
    /// What is being measured, such as "50%".
    public var current: String?
    /// Budgets measured and in all.
    public var done = 0
    public var total = 0
    public var report: BenchmarkReport?
    /// The line to show; nil if none.
    public var error: String?
  }

  public struct Plan: Equatable, Sendable {
    /// Percent of the experts.
    public var expertPercents: [Double] = [100, 50, 25]
    public var promptTokens = 128
    public var newTokens = 64

    public init(expertPercents: [Double] = [100, 50, 25], promptTokens: Int = 128, newTokens: Int = 64) {
      self.expertPercents = expertPercents
      self.promptTokens = promptTokens
      self.newTokens = newTokens
    }
  }

  private let host: EngineHost
  private let machine: String
  private let system: String
  private var running: Task<Void, Never>?

  /// machine, system: for the report.
  public init(host: EngineHost, machine: String, system: String = ProcessInfo.processInfo.operatingSystemVersionString) {
    self.host = host
    self.machine = machine
    self.system = system
    super.init(State())
  }

  /// Measures the open model. It is closed meanwhile, for two engines would share the memory, and opened again at the end.
  public func run(_ plan: Plan = Plan()) {
    guard running == nil else { return }
    guard let loaded = host.loaded, let memory = try? host.parts?.engine.memory() else {
      return update { $0.error = "Choose a model first." }
    }
    let (model, placement, limit) = (loaded.model, loaded.placement, host.memoryLimit)
    let date = ISO8601DateFormatter().string(from: Date())
    update { state in
      state = State(isRunning: true, total: plan.expertPercents.count)
      state.report = BenchmarkReport(model: model.manifest.name, machine: machine, system: system, date: date)
    }
    running = Task { [weak self, host] in
      await host.unload()
      for percent in plan.expertPercents where !Task.isCancelled {
        let name = "\(percent.formatted())%"
        self?.update { $0.current = name }
        let needed = Self.bytes(percent, memory, loaded.info)
        if let limit, needed > limit {
          // The system would end the app.
          self?.update { state in
            state.error = "\(name) of the experts take \(needed >> 20) MiB, this app may take \(limit >> 20) MiB: left out."
            state.done += 1
          }
          continue
        }
        do {
          let result = try await Self.measure(model, placement, percent, name, plan)
          self?.update { state in
            state.report?.results.append(result)
            state.done += 1
          }
        } catch is CancellationError {
          break
        } catch {
          let line = CFMoEError.line(of: error)
          self?.update { $0.error = line }
          break
        }
      }
      await host.load(model)
      self?.running = nil
      self?.update { state in
        state.isRunning = false
        state.current = nil
      }
    }
  }

  public func cancel() { running?.cancel() }

  /// Waits until nothing is measured.
  public func settle() async { await running?.value }

  public func dismissError() { update { $0.error = nil } }

  /// For what cannot be exported or shown.
  public func fail(_ error: any Error) { update { $0.error = CFMoEError.line(of: error) } }

  /// The budget with room for so many percent of the experts.
  private static func bytes(_ percent: Double, _ memory: Memory, _ model: ModelInfo) -> UInt64 {
    let left = Double(memory.expertTotal) * (1 - percent / 100) * Double(model.expertRecordBytes)
    return memory.largestBudgetBytes - UInt64(min(max(left, 0), Double(memory.largestBudgetBytes)))
  }

  private nonisolated static func measure(
    _ model: InstalledModel, _ placement: Placement, _ percent: Double, _ name: String, _ plan: Plan
  ) async throws -> BenchmarkResult {
    let engine = try await Engine.open(
      artifact: model.directory, options: EngineOptions(budget: .expertPercent(percent), placement: placement))
    let result = await Swift.Result { try await measure(engine, name, plan) }
    await engine.close()
    return try result.get()
  }

  private nonisolated static func measure(_ engine: Engine, _ name: String, _ plan: Plan) async throws -> BenchmarkResult {
    let session = try await engine.makeSession()
    let vocabulary = engine.model.vocabSize
    let prompt = (0..<plan.promptTokens).map { Int32((31 * $0 + 7) % vocabulary) }
    // The first run of a kernel is slower than all others.
    _ = try await answer(session, Array(prompt.prefix(4)), 2)
    try await session.reset()
    let (ids, end) = try await answer(session, prompt, plan.newTokens)
    // The same prompt again, its experts in memory as far as the budget goes.
    var second = 0.0
    if end.position + plan.promptTokens <= engine.model.contextSize {
      let (before, after) = (end.metrics.prefill, try await answer(session, prompt, 0).end.metrics.prefill)
      second = Double(after.tokens - before.tokens) / (after.seconds - before.seconds)
    }
    let placement = try engine.placement()
    return BenchmarkResult(
      memoryBudget: name, io: try engine.io(), policy: try engine.policy(), warning: try await engine.warning(),
      prefillDevice: placement.prefill.rawValue, decodeDevice: placement.decode.rawValue, deviceName: try engine.deviceName(),
      promptTokens: end.promptTokens, newTokens: end.newTokens, tokenIDs: ids, metrics: end.metrics,
      secondPrefillTokensPerSecond: second, memory: end.memory)
  }

  private nonisolated static func answer(
    _ session: Session, _ prompt: [Int32], _ newTokens: Int
  ) async throws -> (ids: [Int32], end: Generation) {
    var ids: [Int32] = []
    var end: Generation?
    for try await event in session.generate(prompt, maxNewTokens: newTokens, stopTokens: []) {
      switch event {
      case .token(let token): ids.append(token.id)
      case .done(let done): end = done
      }
    }
    guard let end, end.reason != .cancelled else { throw CancellationError() }
    return (ids, end)
  }
}

extension Result where Failure == any Error {
  /// What an async body returns or throws.
  fileprivate init(_ body: () async throws -> Success) async {
    do {
      self = .success(try await body())
    } catch {
      self = .failure(error)
    }
  }
}
