// The app: one window over one AppModel.
import CFMoEKit
import SwiftUI

@main
struct CFMoEApp: App {
  @StateObject private var app = AppModel()

  var body: some Scene {
    WindowGroup { RootView(app: app) }
  }
}
