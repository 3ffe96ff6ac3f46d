// What the system says about memory: how much is left to this app, and when it wants some back.
import Foundation
import UIKit
import os

/// Bytes until the system ends the app. The entitlement increased-memory-limit raises them. 0 where there is no limit (the simulator):
/// unknown then.
@Sendable func availableMemory() -> UInt64? {
  let bytes = os_proc_available_memory()
  return bytes > 0 ? UInt64(bytes) : nil
}

/// Calls `body` on every memory warning, as long as this lives.
@MainActor
final class MemoryWarnings {
  private var observer: (any NSObjectProtocol)?

  init(_ body: @escaping @MainActor @Sendable () -> Void) {
    observer = NotificationCenter.default.addObserver(
      forName: UIApplication.didReceiveMemoryWarningNotification, object: nil, queue: .main
    ) { _ in MainActor.assumeIsolated { body() } }
  }
}
