// Colours with a meaning, the same as in the Android app.
import SwiftUI

extension Color {
  static let memoryWeights = Color(red: 0.0, green: 0.41, blue: 0.43)
  static let memoryConversation = Color(red: 0.36, green: 0.49, blue: 0.6)
  static let memoryExperts = Color(red: 0.89, green: 0.63, blue: 0.36)
  static let heatHot = Color(red: 0.76, green: 0.25, blue: 0.05)
  static let heatCold = Color.secondary.opacity(0.2)
}
