// The four screens.
import CFMoEKit
import SwiftUI

struct RootView: View {
  @ObservedObject var app: AppModel

  var body: some View {
    TabView {
      screen("Models") {
        if let models = app.models { ModelsView(models: models) } else { Text(app.problem ?? "").padding() }
      }
      .tabItem { Label("Models", systemImage: "square.stack.3d.up") }
      screen("Chat") { ChatView(chat: app.chat, settings: app.settings) }
        .tabItem { Label("Chat", systemImage: "bubble.left.and.bubble.right") }
      screen("Cache") { PanelView(panel: app.panel, host: app.host) }
        .tabItem { Label("Cache", systemImage: "square.grid.3x3.fill") }
      screen("Benchmark") { BenchmarkView(benchmark: app.benchmark, host: app.host) }
        .tabItem { Label("Benchmark", systemImage: "gauge") }
    }
  }

  private func screen<Content: View>(_ title: String, @ViewBuilder content: () -> Content) -> some View {
    NavigationView { content().navigationTitle(title) }
      .navigationViewStyle(.stack)
  }
}
