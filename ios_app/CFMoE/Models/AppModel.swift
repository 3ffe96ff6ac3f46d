// Puts the app together: the library, the engine and the screens' view models.
import CFMoEKit
import Foundation
import SwiftUI

@MainActor
final class AppModel: ObservableObject {
  let host: Observed<EngineHost>
  let chat: Observed<ChatViewModel>
  let panel: Observed<PanelViewModel>
  let benchmark: Observed<BenchmarkViewModel>
  let settings: Observed<SettingsViewModel>
  /// nil where the library cannot be used; `problem` says why.
  let models: Observed<ModelsViewModel>?
  let problem: String?
  private let memoryWarnings: MemoryWarnings

  init() {
    let host = EngineHost(devices: Device.usable(), availableMemory: availableMemory, settingsFile: ModelStore.settingsFile())
    let panel = PanelViewModel(host: host)
    self.host = Observed(host)
    self.panel = Observed(panel)
    chat = Observed(ChatViewModel(host: host))
    settings = Observed(SettingsViewModel(host: host))
    benchmark = Observed(BenchmarkViewModel(host: host, machine: machineName()))
    do {
      models = Observed(ModelsViewModel(library: try ModelStore.open(), host: host))
      problem = nil
    } catch {
      models = nil
      problem = CFMoEError.line(of: error)
    }
    memoryWarnings = MemoryWarnings { panel.lowMemory() }
  }
}
