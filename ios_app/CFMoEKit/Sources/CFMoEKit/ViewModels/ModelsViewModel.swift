// The models screen: what is there, import with checksums, deletion, choice.
import Foundation

@MainActor
public final class ModelsViewModel: ViewModel<ModelsViewModel.State> {
  public struct State: Equatable, Sendable {
    public var models: [InstalledModel] = []
    /// Directories in the library that are no models: a line each.
    public var problems: [String] = []
    /// nil while nothing is imported.
    public var importing: ImportProgress?
    /// The model that is open.
    public var openID: String?
    /// The model that is being opened.
    public var opening: String?
    /// The line to show; nil if none.
    public var error: String?
  }

  private let library: ModelLibrary
  private let host: EngineHost
  private var importTask: Task<Void, Never>?

  public init(library: ModelLibrary, host: EngineHost) {
    self.library = library
    self.host = host
    super.init(State())
    host.observe { [weak self] in self?.hostChanged() }
    refresh()
  }

  public func refresh() {
    let found = library.models()
    update { state in
      state.models = found.models
      state.problems = found.problems
    }
  }

  /// Imports a model's directory or archive; one at a time. `finished` is called in any case, on the main actor: what gave access to
  /// `source` can be given back.
  public func importModel(_ source: URL, finished: @escaping @MainActor () -> Void = {}) {
    guard importTask == nil else {
      update { $0.error = "Another model is being imported: wait for it, or cancel it." }
      return finished()
    }
    update { state in
      state.error = nil
      state.importing = ImportProgress(model: source.lastPathComponent)
    }
    let importer = ModelImporter(library: library)
    importTask = Task { [weak self] in
      let (progress, continuation) = AsyncStream.makeStream(of: ImportProgress.self, bufferingPolicy: .bufferingNewest(1))
      let display = Task { for await step in progress { self?.update { $0.importing = step } } }
      do {
        _ = try await importer.run(source) { continuation.yield($0) }
      } catch is CancellationError {
        // The user knows.
      } catch {
        let line = CFMoEError.line(of: error)
        self?.update { $0.error = line }
      }
      continuation.finish()
      await display.value
      self?.importTask = nil
      self?.update { $0.importing = nil }
      self?.refresh()
      finished()
    }
  }

  /// For what the system's file picker could not give.
  public func fail(_ error: any Error) { update { $0.error = CFMoEError.line(of: error) } }

  public func cancelImport() { importTask?.cancel() }

  /// Waits until no import is under way.
  public func settle() async { await importTask?.value }

  public func open(_ model: InstalledModel) async {
    update { $0.error = nil }
    await host.load(model)
  }

  public func delete(_ model: InstalledModel) async {
    if host.loaded?.model.id == model.id { await host.unload() }
    do {
      try library.delete(model)
    } catch {
      update { $0.error = CFMoEError.line(of: error) }
    }
    refresh()
  }

  public func dismissError() { update { $0.error = nil } }

  private func hostChanged() {
    update { state in
      state.openID = host.loaded?.model.id
      state.opening = nil
      switch host.state {
      case .loading(let model): state.opening = model
      case .failed(let line): state.error = line
      case .empty, .ready: break
      }
    }
  }
}
