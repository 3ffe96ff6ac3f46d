// The experts in memory: a row per MoE layer, a cell per expert.
import CFMoEKit
import SwiftUI

struct HeatMapView: View {
  let residents: Residents

  var body: some View {
    VStack(alignment: .leading) {
      Canvas { context, size in
        let width = size.width / Double(max(residents.experts, 1))
        let height = size.height / Double(max(residents.layers, 1))
        for layer in 0..<residents.layers {
          for expert in 0..<residents.experts {
            let cell = CGRect(x: Double(expert) * width, y: Double(layer) * height, width: width, height: height)
            let color = residents[layer, expert] ? Color.heatHot : Color.heatCold
            context.fill(Path(cell.insetBy(dx: width > 3 ? 0.5 : 0, dy: height > 3 ? 0.5 : 0)), with: .color(color))
          }
        }
      }
      .frame(height: Double(min(max(residents.layers, 1) * 14, 400)))
      .accessibilityHidden(true)
      Text(caption).font(.footnote)
    }
  }

  private var caption: String {
    "\(residents.count) of \(residents.layers * residents.experts) experts are in memory, in \(residents.layers) layers (a row each)"
  }
}
