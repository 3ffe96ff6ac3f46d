// The live panel: speed, hit rates, bytes read, memory against its budget, the experts in memory.
import CFMoEKit
import SwiftUI

struct PanelView: View {
  @ObservedObject var panel: Observed<PanelViewModel>
  @ObservedObject var host: Observed<EngineHost>

  var body: some View {
    List {
      if let line = panel.error {
        NoticeView(line: line) { panel.model.dismissError() }
      }
      if let memory = panel.memory {
        Section("Memory budget") { BudgetSlider(panel: panel, memory: memory) }
        Section("Memory") { MemoryBar(memory: memory) }
        Section("Device") { DevicePicker(host: host) }
        Section("Speed") {
          row("Now", speedText(panel.tokensPerSecond))
          row("Reading the prompt", speedText(panel.metrics.prefill.tokens > 0 ? panel.metrics.prefill.tokensPerSecond : nil))
          row("Writing", speedText(panel.metrics.decode.tokens > 0 ? panel.metrics.decode.tokensPerSecond : nil))
        }
        Section("Experts found in memory") {
          row("Reading the prompt", shareText(panel.metrics.prefill.hitRate))
          row("Writing", shareText(panel.metrics.decode.hitRate))
        }
        Section("Read from flash per token") {
          row("Reading the prompt", sizeText(panel.metrics.prefill.bytesPerToken))
          row("Writing", sizeText(panel.metrics.decode.bytesPerToken))
        }
        if let residents = panel.residents {
          Section("Experts in memory") { HeatMapView(residents: residents) }
        }
      } else {
        Text("No model is open.").foregroundColor(.secondary)
      }
    }
    .onAppear { panel.model.start() }
    .onDisappear { panel.model.stop() }
  }

  private func row(_ name: String, _ value: String) -> some View {
    HStack {
      Text(name)
      Spacer()
      Text(value).foregroundColor(.secondary).font(.body.monospacedDigit())
    }
  }
}

/// Takes effect when the finger is lifted, also during an answer.
private struct BudgetSlider: View {
  @ObservedObject var panel: Observed<PanelViewModel>
  let memory: Memory
  @State private var wanted: Double?

  var body: some View {
    let range = panel.budgetRange ?? memory.budgetBytes...memory.budgetBytes
    VStack(alignment: .leading) {
      if range.lowerBound < range.upperBound {
        Slider(value: position, in: Double(range.lowerBound)...Double(range.upperBound)) {
          Text("Memory budget")
        } minimumValueLabel: {
          Text(sizeText(range.lowerBound)).font(.caption)
        } maximumValueLabel: {
          Text(sizeText(range.upperBound)).font(.caption)
        } onEditingChanged: { isEditing in
          guard !isEditing, let bytes = wanted else { return }
          panel.model.setBudget(UInt64(bytes))
          wanted = nil
        }
        .accessibilityValue(sizeText(wanted ?? Double(panel.budgetBytes)))
      }
      Text("\(sizeText(wanted ?? Double(panel.budgetBytes))), room for \(memory.expertSlots) of \(memory.expertTotal) experts")
        .font(.footnote)
      if let available = panel.availableBytes {
        Text("\(sizeText(available)) more until the system ends the app").font(.caption).foregroundColor(.secondary)
      }
    }
  }

  private var position: Binding<Double> {
    Binding(get: { @MainActor in wanted ?? Double(panel.budgetBytes) }, set: { @MainActor in wanted = $0 })
  }
}

/// Weights, conversation and experts from left to right.
private struct MemoryBar: View {
  let memory: Memory

  var body: some View {
    VStack(alignment: .leading) {
      Canvas { context, size in
        let parts: [(UInt64, Color)] = [
          (memory.weightsBytes, .memoryWeights),
          (memory.kvBytes + memory.workspaceBytes + memory.arenaBytes, .memoryConversation),
          (memory.poolBytes, .memoryExperts),
        ]
        let whole = Double(max(memory.budgetBytes, 1))
        var x = 0.0
        for (bytes, color) in parts {
          let width = Double(bytes) / whole * size.width
          context.fill(Path(CGRect(x: x, y: 0, width: width, height: size.height)), with: .color(color))
          x += width
        }
      }
      .frame(height: 16)
      .accessibilityHidden(true)
      Text(
        "\(sizeText(memory.weightsBytes)) weights, \(sizeText(memory.poolBytes)) experts, of a budget of \(sizeText(memory.budgetBytes))"
      )
      .font(.footnote)
    }
  }
}

private struct DevicePicker: View {
  @ObservedObject var host: Observed<EngineHost>

  var body: some View {
    if let loaded = host.model.loaded {
      Picker("Device that computes", selection: choice(loaded.placement)) {
        ForEach(loaded.placements, id: \.self) { Text(placementText($0)) }
      }
      .disabled(loaded.placements.count < 2)
      if !loaded.deviceName.isEmpty { Text(loaded.deviceName).font(.footnote).foregroundColor(.secondary) }
      if !loaded.warning.isEmpty { Text(loaded.warning).font(.footnote) }
    }
  }

  private func choice(_ placement: Placement) -> Binding<Placement> {
    Binding(get: { @MainActor in placement }, set: { @MainActor in choose($0) })
  }

  private func choose(_ placement: Placement) { Task { await host.model.choose(placement) } }
}
