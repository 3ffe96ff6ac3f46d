// The one engine of the app, its conversation and its tokenizer: what all screens share.
import Foundation

/// What the user chose for the engine and its answers.
public struct Settings: Equatable, Sendable {
  /// Of the model that is open; nil: all experts, as far as the memory that is available goes.
  public var budgetBytes: UInt64?
  public var placement = Placement.cpu
  /// How answers are made where neither the user nor the model's authors say it.
  public var plain = GenerationSettings()

  public init() {}
}

@MainActor
public final class EngineHost: ViewModel<EngineHost.State> {
  public enum State: Equatable, Sendable {
    case empty
    case loading(model: String)
    case ready(Loaded)
    /// The one line that says why.
    case failed(String)
  }

  public struct Loaded: Equatable, Sendable {
    public var model: InstalledModel
    public var info: ModelInfo
    /// On devices that this machine has and the model has kernels for.
    public var placements: [Placement]
    public var placement: Placement
    /// Of the GPU; empty if none is used.
    public var deviceName: String
    public var io: String
    public var policy: String
    /// What the user should know about how it was opened; empty if nothing.
    public var warning: String
    /// Why there is no text to be had of this model; nil if there is.
    public var textError: String?
    /// Counts loads and new conversations, so that screens know when theirs has ended.
    public var conversation: Int
  }

  struct Parts: Sendable {
    let engine: Engine
    let session: Session
    let tokenizer: Tokenizer?
    let format: ChatFormat
  }

  public var settings = Settings()
  let availableMemory: AvailableMemory
  /// What the engine may take in all, as the system said before the open model was read; nil where it does not say.
  private(set) var memoryLimit: UInt64?
  private let machineDevices: [Device]
  private(set) var parts: Parts?
  private var lastModel: InstalledModel.ID?
  private var conversations = 0
  private var loads = 0
  private var observers: [@MainActor () -> Void] = []

  private let store: SettingsStore
  private var generations: [String: GenerationSettings]
  private var recommended = GenerationSettings()

  /// devices: what this machine has. settingsFile: where the settings of answers are kept; nil: nowhere.
  public init(devices: [Device] = [.cpu], availableMemory: @escaping AvailableMemory = { nil }, settingsFile: URL? = nil) {
    store = SettingsStore(file: settingsFile)
    generations = store.read()
    machineDevices = devices
    self.availableMemory = availableMemory
    super.init(.empty)
  }

  /// Calls `body` after each change of the state.
  public func observe(_ body: @escaping @MainActor () -> Void) { observers.append(body) }

  override func stateChanged() {
    super.stateChanged()
    observers.forEach { $0() }
  }

  public var loaded: Loaded? {
    if case .ready(let loaded) = state { return loaded }
    return nil
  }

  /// Closes what is open and opens `model`. The last of several calls wins.
  public func load(_ model: InstalledModel) async {
    loads += 1
    let load = loads
    update { $0 = .loading(model: model.manifest.name) }
    await closeParts()
    memoryLimit = availableMemory().map(usable)
    // A budget that does for one model may be too small for another, which then could not be opened at all.
    if let lastModel, lastModel != model.id { settings.budgetBytes = nil }
    lastModel = model.id
    do {
      let placements = Placement.choices(machineDevices.filter { model.manifest.devices.contains($0.rawValue) })
      // What was chosen for another model may not do for this one.
      let placement = placements.contains(settings.placement) ? settings.placement : placements.first ?? .cpu
      let (engine, refusal) = try await Self.open(model, budget(), placement, canUseCPU: placements.contains(.cpu))
      guard load == loads else { return await engine.close() }
      let session = try await engine.makeSession()
      let text = Result { try Tokenizer(artifact: model.directory) }
      let opened = Parts(
        engine: engine, session: session, tokenizer: try? text.get(), format: model.manifest.chat ?? .plain)
      var textError: String?
      if case .failure(let error) = text { textError = CFMoEError.line(of: error) }
      let warning = [refusal, try await engine.warning()].compactMap { $0 }.filter { !$0.isEmpty }.joined(separator: " ")
      recommended = GenerationSettings.recommended(
        model.directory.appendingPathComponent("generation_config.json"), otherwise: settings.plain)
      conversations += 1
      let loaded = Loaded(
        model: model, info: engine.model, placements: placements, placement: try engine.placement(),
        deviceName: try engine.deviceName(), io: try engine.io(), policy: try engine.policy(), warning: warning,
        textError: textError, conversation: conversations)
      guard load == loads else { return await engine.close() }
      if refusal != nil { settings.placement = .cpu }
      parts = opened
      update { $0 = .ready(loaded) }
    } catch {
      guard load == loads else { return }
      update { $0 = .failed(CFMoEError.line(of: error)) }
    }
  }

  /// An engine on the devices asked for; where a GPU cannot be used one on the CPU, and the line that says why.
  private nonisolated static func open(
    _ model: InstalledModel, _ budget: MemoryBudget, _ placement: Placement, canUseCPU: Bool
  ) async throws -> (Engine, String?) {
    do {
      return (try await Engine.open(artifact: model.directory, options: EngineOptions(budget: budget, placement: placement)), nil)
    } catch let refusal where placement != .cpu && canUseCPU {
      let engine = try await Engine.open(artifact: model.directory, options: EngineOptions(budget: budget, placement: .cpu))
      return (engine, "The GPU cannot be used, the CPU computes: \(CFMoEError.line(of: refusal))")
    }
  }

  /// How answers of the open model are made.
  public var generation: GenerationSettings {
    guard let loaded else { return settings.plain }
    return generations[loaded.model.id] ?? recommended
  }

  /// For the open model; nil: what its authors recommend. Throws where it cannot be kept for the app's next start.
  public func setGeneration(_ settings: GenerationSettings?) throws {
    guard let loaded else { return }
    generations[loaded.model.id] = settings
    try store.write(generations)
  }

  /// Opens the model again on other devices.
  public func choose(_ placement: Placement) async {
    guard let loaded, loaded.placement != placement else { return }
    settings.placement = placement
    await load(loaded.model)
  }

  public func unload() async {
    loads += 1
    await closeParts()
    update { $0 = .empty }
  }

  /// Forgets the conversation; the model stays open, and its experts in memory.
  public func newConversation() async throws {
    guard let parts, case .ready(var loaded) = state else { return }
    parts.session.cancel()
    try await parts.session.rewind(to: 0)
    conversations += 1
    loaded.conversation = conversations
    if self.parts?.engine === parts.engine { update { $0 = .ready(loaded) } }
  }

  /// For the system's memory warning: as little as the engine works with. No text changes.
  public func lowMemory() throws { try parts?.engine.trim() }

  private func closeParts() async {
    let old = parts
    parts = nil
    await old?.engine.close()
  }

  /// The user's budget, otherwise most of what is available: the engine takes no more of it than it has a use for.
  private func budget() -> MemoryBudget {
    if let bytes = settings.budgetBytes { return .bytes(min(bytes, memoryLimit.map { max(1, $0) } ?? bytes)) }
    return memoryLimit.map { .bytes(max(1, $0)) } ?? .automatic
  }
}

/// So much of the available memory may go to the engine: the app and the system's own buffers need the rest.
func usable(_ available: UInt64) -> UInt64 { available - max(available / 10, min(available, 32 << 20)) }
