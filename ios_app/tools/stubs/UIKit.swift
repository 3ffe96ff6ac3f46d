// The part of UIKit that the app uses: declarations only.
@_exported import Foundation

@MainActor open class UIApplication {
  public nonisolated class var didReceiveMemoryWarningNotification: Notification.Name { Notification.Name("") }
}
