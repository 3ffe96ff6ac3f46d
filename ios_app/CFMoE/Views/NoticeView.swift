// A line that the user should read, and can put away.
import SwiftUI

struct NoticeView: View {
  let line: String
  let dismiss: @MainActor () -> Void

  var body: some View {
    HStack(alignment: .top) {
      Image(systemName: "exclamationmark.triangle").foregroundColor(.orange)
      Text(line).font(.footnote)
      Spacer()
      Button(action: dismiss) { Image(systemName: "xmark") }
        .buttonStyle(.borderless)
        .accessibilityLabel("Dismiss")
    }
  }
}
