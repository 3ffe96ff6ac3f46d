// The part of UniformTypeIdentifiers that the app uses: declarations only.
public struct UTType: Hashable, Sendable {
  public init?(filenameExtension: String) {}
  private init() {}
  public static let folder = UTType(), zip = UTType(), gzip = UTType(), json = UTType()
}
