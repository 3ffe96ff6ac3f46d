// The settings of answers: numbers within their bounds, and the system prompt. What is right takes effect as it is typed.
import Foundation

@MainActor
public final class SettingsViewModel: ViewModel<SettingsViewModel.State> {
  public struct State: Equatable, Sendable {
    /// nil while no model is open.
    public var model: String?
    public var greedy = true
    /// What stands in the fields.
    public var texts: [SettingField: String] = [:]
    /// Of fields whose text is no value: what would be one.
    public var errors: [SettingField: String] = [:]
    public var system = ""
    /// Whether the model's chat template takes a system prompt.
    public var hasSystem = false
    /// Why settings could not be kept.
    public var error: String?
  }

  private let host: EngineHost
  private var shown: String?

  public init(host: EngineHost) {
    self.host = host
    super.init(State())
    host.observe { [weak self] in self?.hostChanged() }
    hostChanged()
  }

  public func setGreedy(_ greedy: Bool) {
    update { $0.greedy = greedy }
    keep { $0.greedy = greedy }
  }

  public func setText(_ field: SettingField, _ text: String) {
    let value = field.value(text)
    let isRight = value != nil || (field == .seed && text.allSatisfy(\.isWhitespace))
    update { state in
      state.texts[field] = text
      state.errors[field] = isRight ? nil : field.rule
    }
    if isRight { keep { $0[field] = value } }
  }

  public func setSystem(_ text: String) {
    update { $0.system = text }
    // Without a text of the template's own an empty one is none.
    let own = host.loaded?.model.manifest.chat?.system?.standard ?? ""
    keep { $0.system = text.isEmpty && own.isEmpty ? nil : text }
  }

  /// What the model's authors recommend.
  public func reset() {
    keep(nil)
    show()
  }

  private func keep(_ change: (inout GenerationSettings) -> Void) {
    var settings = host.generation
    change(&settings)
    keep(settings)
  }

  private func keep(_ settings: GenerationSettings?) {
    do {
      try host.setGeneration(settings)
      update { $0.error = nil }
    } catch {
      update { $0.error = CFMoEError.line(of: error) }
    }
  }

  private func hostChanged() {
    guard shown != host.loaded?.model.id else { return }
    shown = host.loaded?.model.id
    show()
  }

  private func show() {
    let settings = host.generation
    let chat = host.loaded?.model.manifest.chat
    update { state in
      state.model = host.loaded?.model.manifest.name
      state.greedy = settings.greedy
      state.texts = [:]
      for field in SettingField.allCases { state.texts[field] = settings[field].map(field.text) ?? "" }
      state.errors = [:]
      state.hasSystem = chat?.system != nil
      state.system = settings.system ?? chat?.system.flatMap { chat?.dated($0.standard, .today()) } ?? ""
    }
  }
}
