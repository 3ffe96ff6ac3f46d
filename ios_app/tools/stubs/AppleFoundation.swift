// What Apple's Foundation has and Linux's lacks, as far as the app uses it: declarations only.
import Foundation

extension URL {
  public func startAccessingSecurityScopedResource() -> Bool { false }
  public func stopAccessingSecurityScopedResource() {}
}

open class FileWrapper {
  public init(regularFileWithContents contents: Data) {}
  open var regularFileContents: Data? { nil }
}
