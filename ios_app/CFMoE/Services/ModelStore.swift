// Where models are: those in the app's bundle, and the imported ones, which backups leave out.
import CFMoEKit
import Foundation

enum ModelStore {
  /// The directory of the bundle that holds the models which come with the app, one directory each.
  private static let bundledFolder = "Model"

  static func open() throws -> ModelLibrary {
    var root = try FileManager.default.url(for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
      .appendingPathComponent("Models", isDirectory: true)
    let library = try ModelLibrary(root: root, bundled: bundled())
    var values = URLResourceValues()
    values.isExcludedFromBackup = true
    try root.setResourceValues(values)
    return library
  }

  /// Where the settings of answers are kept; nil where there is no such place.
  static func settingsFile() -> URL? {
    let support = try? FileManager.default.url(for: .applicationSupportDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    return support?.appendingPathComponent("settings.json")
  }

  private static func bundled() -> [URL] {
    guard let folder = Bundle.main.resourceURL?.appendingPathComponent(bundledFolder, isDirectory: true),
      let names = try? FileManager.default.contentsOfDirectory(atPath: folder.path)
    else { return [] }
    return names.filter { !$0.hasPrefix(".") }.sorted().map { folder.appendingPathComponent($0, isDirectory: true) }
  }
}
