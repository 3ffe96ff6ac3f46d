// How answers are made: numbers within their bounds, and the system prompt.
import CFMoEKit
import SwiftUI

struct SettingsView: View {
  @ObservedObject var settings: Observed<SettingsViewModel>
  let done: @MainActor () -> Void

  var body: some View {
    NavigationView {
      List {
        if let line = settings.state.error { Text(line).font(.footnote).foregroundColor(.orange) }
        Section("Choice of the next word") {
          Toggle("Always the likeliest word (greedy)", isOn: greedy)
          ForEach([SettingField.temperature, .topK, .topP, .seed], id: \.self) { field in
            FieldView(field: field, settings: settings).disabled(settings.greedy)
          }
        }
        Section("Answers") {
          ForEach([SettingField.repetitionPenalty, .maxNewTokens], id: \.self) { FieldView(field: $0, settings: settings) }
        }
        if settings.hasSystem {
          Section("System prompt: what the model is told before everything else") {
            TextEditor(text: system).frame(minHeight: 100).accessibilityLabel("System prompt")
          }
        }
        Section { Button("Take the model's own") { settings.model.reset() } }
      }
      .navigationTitle(settings.state.model.map { "Answers of \($0)" } ?? "Answers")
      .toolbar { ToolbarItem(placement: .navigationBarTrailing) { Button("Done", action: done) } }
    }
    .navigationViewStyle(.stack)
  }

  private var greedy: Binding<Bool> {
    Binding(get: { @MainActor in settings.greedy }, set: { @MainActor in settings.model.setGreedy($0) })
  }

  private var system: Binding<String> {
    Binding(get: { @MainActor in settings.system }, set: { @MainActor in settings.model.setSystem($0) })
  }
}

private struct FieldView: View {
  let field: SettingField
  @ObservedObject var settings: Observed<SettingsViewModel>

  var body: some View {
    VStack(alignment: .leading, spacing: 4) {
      Text(name).font(.footnote).foregroundColor(.secondary)
      TextField(field == .seed ? "another one each time" : field.text(field.range.lowerBound), text: text)
        .keyboardType(field.isWhole ? .numberPad : .decimalPad)
        .accessibilityLabel(Text(name))
      if let error = settings.errors[field] { Text(error).font(.caption).foregroundColor(.orange) }
    }
  }

  private var name: String {
    let bounds = "\(field.text(field.range.lowerBound)) to \(field.text(field.range.upperBound))"
    switch field {
    case .temperature: return "Temperature, \(bounds): how far from the likeliest words"
    case .topK: return "Of so many likeliest words, \(bounds); 0 is off"
    case .topP: return "Of the likeliest words up to this share, \(bounds); 1 is off"
    case .repetitionPenalty: return "Repetition penalty, \(bounds); 1 is off"
    case .seed: return "Seed, \(bounds); empty for another one each time"
    case .maxNewTokens: return "Longest answer in tokens, \(bounds)"
    }
  }

  private var text: Binding<String> {
    Binding(
      get: { @MainActor in settings.texts[field] ?? "" },
      set: { @MainActor new in if new != settings.texts[field] { settings.model.setText(field, new) } })
  }
}
