// The live panel: speed, hit rates, bytes read, memory, resident experts, and the budget that can be moved while the engine runs.
import Foundation

@MainActor
public final class PanelViewModel: ViewModel<PanelViewModel.State> {
  public struct State: Equatable, Sendable {
    public var memory: Memory?
    public var metrics = Metrics()
    public var residents: Residents?
    /// Tokens decoded per second since the last look; nil while nothing is decoded.
    public var tokensPerSecond: Double?
    /// What the process may still take; nil where the system does not say.
    public var availableBytes: UInt64?
    /// Budgets that the slider offers; nil without a model.
    public var budgetRange: ClosedRange<UInt64>?
    /// Where the slider stands: the budget asked for while it is being changed, otherwise the engine's.
    public var budgetBytes: UInt64 = 0
    public var isChangingBudget = false
    /// The line to show; nil if none.
    public var error: String?
  }

  private let host: EngineHost
  private let clock: @Sendable () -> Double
  private var polling: Task<Void, Never>?
  private var budgetTask: Task<Void, Never>?
  private var wantedBudget: UInt64?
  private var last: (conversation: Int, tokens: UInt64, time: Double)?

  /// clock: seconds, for the speed between two looks.
  public init(host: EngineHost, clock: @escaping @Sendable () -> Double = { ProcessInfo.processInfo.systemUptime }) {
    self.host = host
    self.clock = clock
    super.init(State())
    host.observe { [weak self] in self?.hostChanged() }
  }

  /// Looks every so many seconds until `stop`.
  public func start(every seconds: Double = 0.5) {
    guard polling == nil else { return }
    polling = Task { [weak self] in
      while !Task.isCancelled {
        await self?.refresh()
        try? await Task.sleep(nanoseconds: UInt64(seconds * 1e9))
      }
    }
  }

  public func stop() {
    polling?.cancel()
    polling = nil
  }

  /// Looks once.
  public func refresh() async {
    guard let parts = host.parts, let conversation = host.loaded?.conversation else { return }
    do {
      // Memory first: it is to be had at any time, the others only between two tokens.
      showMemory(try parts.engine.memory())
      let metrics = try await parts.session.metrics()
      let residents = try await parts.engine.residents()
      guard host.loaded?.conversation == conversation else { return }
      let now = clock()
      let tokens = metrics.decode.tokens
      var speed: Double?
      if let last, last.conversation == conversation, tokens > last.tokens, now > last.time {
        speed = Double(tokens - last.tokens) / (now - last.time)
      }
      last = (conversation, tokens, now)
      update { state in
        state.metrics = metrics
        state.residents = residents
        state.tokensPerSecond = speed
      }
    } catch {
      // Closed while we looked: the next state of the host says so.
      guard host.parts?.engine === parts.engine else { return }
      update { $0.error = CFMoEError.line(of: error) }
    }
  }

  /// Moves the budget, also while an answer comes. Of several wishes in a row the last counts.
  public func setBudget(_ bytes: UInt64) {
    guard let range = state.budgetRange else { return }
    let wanted = min(max(bytes, range.lowerBound), range.upperBound)
    wantedBudget = wanted
    update { state in
      state.budgetBytes = wanted
      state.isChangingBudget = true
      state.error = nil
    }
    guard budgetTask == nil else { return }
    budgetTask = Task { [weak self] in await self?.changeBudget() }
  }

  /// Waits until no change of the budget is under way.
  public func settle() async { await budgetTask?.value }

  /// For the system's memory warning.
  public func lowMemory() {
    do {
      try host.lowMemory()
      if let memory = try host.parts?.engine.memory() { showMemory(memory) }
    } catch {
      update { $0.error = CFMoEError.line(of: error) }
    }
  }

  public func dismissError() { update { $0.error = nil } }

  private func changeBudget() async {
    while let bytes = wantedBudget, let engine = host.parts?.engine {
      wantedBudget = nil
      do {
        let memory = try await engine.setBudget(.bytes(bytes))
        host.settings.budgetBytes = bytes
        if wantedBudget == nil { showMemory(memory, isSettled: true) }
      } catch {
        update { $0.error = CFMoEError.line(of: error) }
        if wantedBudget == nil, let memory = try? engine.memory() { showMemory(memory, isSettled: true) }
      }
    }
    budgetTask = nil
    update { $0.isChangingBudget = false }
  }

  private func showMemory(_ memory: Memory, isSettled: Bool = false) {
    let available = host.availableMemory()
    update { state in
      state.memory = memory
      state.availableBytes = available
      var upper = memory.largestBudgetBytes
      // A budget that is not full yet has not taken its memory: what was free before the model was opened bounds it as well.
      if let limit = host.memoryLimit { upper = min(upper, limit) }
      if let available { upper = min(upper, memory.budgetBytes + usable(available)) }
      state.budgetRange = memory.smallestBudgetBytes...max(memory.smallestBudgetBytes, upper)
      if isSettled || !state.isChangingBudget { state.budgetBytes = memory.budgetBytes }
    }
  }

  private func hostChanged() {
    switch host.state {
    case .ready: Task { await refresh() }
    case .loading, .empty, .failed:
      last = nil
      wantedBudget = nil
      update { $0 = State() }
    }
  }
}
