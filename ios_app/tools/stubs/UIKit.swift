// The part of UIKit that the app uses: declarations only.
@_exported import Foundation

public class UIPasteboard {
  public class var general: UIPasteboard { UIPasteboard() }
  public var string: String?
}

public enum UIKeyboardType: Sendable { case numberPad, decimalPad }

@MainActor open class UIApplication {
  public nonisolated class var didReceiveMemoryWarningNotification: Notification.Name { Notification.Name("") }
}
