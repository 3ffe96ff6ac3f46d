// A file or directory that the user chose outside of the app, reachable until `giveBack`.
import Foundation

@MainActor
final class ChosenFile {
  let url: URL
  private var isHeld: Bool

  init(_ url: URL) {
    self.url = url
    isHeld = url.startAccessingSecurityScopedResource()
  }

  func giveBack() {
    if isHeld { url.stopAccessingSecurityScopedResource() }
    isHeld = false
  }
}
