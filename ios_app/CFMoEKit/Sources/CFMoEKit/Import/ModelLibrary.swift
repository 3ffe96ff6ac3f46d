// The models on this device: those that came with the app, and imported ones in a directory of their own.
import Foundation

public struct InstalledModel: Equatable, Identifiable, Sendable {
  /// The directory's name.
  public let id: String
  public let directory: URL
  public let manifest: Manifest
  /// Came with the app and cannot be deleted.
  public let isBundled: Bool
}

public struct ModelLibrary: Sendable {
  public let root: URL
  private let bundled: [URL]

  static let stagingPrefix = ".import-"

  /// Makes the directory, and clears what interrupted imports have left. One library at a time has a directory.
  public init(root: URL, bundled: [URL] = []) throws {
    self.root = root
    self.bundled = bundled
    do {
      try FileManager.default.createDirectory(at: root, withIntermediateDirectories: true)
      for name in try FileManager.default.contentsOfDirectory(atPath: root.path) where name.hasPrefix(Self.stagingPrefix) {
        try FileManager.default.removeItem(at: root.appendingPathComponent(name))
      }
    } catch {
      throw CFMoEError.user("\(root.path) cannot be used for models: \(error.localizedDescription)")
    }
  }

  /// Models by name, and a line for each directory that is none.
  public func models() -> (models: [InstalledModel], problems: [String]) {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: root.path)) ?? []
    let imported = names.filter { !$0.hasPrefix(".") }.sorted().map { root.appendingPathComponent($0, isDirectory: true) }
    var models: [InstalledModel] = []
    var problems: [String] = []
    for (directory, isBundled) in bundled.map({ ($0, true) }) + imported.map({ ($0, false) }) {
      do {
        models.append(try Self.model(at: directory, isBundled: isBundled))
      } catch {
        problems.append(CFMoEError.line(of: error))
      }
    }
    return (models, problems)
  }

  static func model(at directory: URL, isBundled: Bool) throws -> InstalledModel {
    let file = try InputFile(directory.appendingPathComponent(Manifest.fileName).path)
    guard file.size <= Manifest.mostBytes else { throw CFMoEError.user("\(file.path) has \(file.size) bytes: it is no manifest") }
    let manifest = try Manifest(
      Data(try file.bytes(at: 0, count: Int(file.size))), source: "\(directory.lastPathComponent)/\(Manifest.fileName)")
    return InstalledModel(id: directory.lastPathComponent, directory: directory, manifest: manifest, isBundled: isBundled)
  }

  public func delete(_ model: InstalledModel) throws {
    guard !model.isBundled else { throw CFMoEError.user("\(model.manifest.name) came with the app: it cannot be deleted") }
    // Out of sight first, so that an interruption leaves no half of a model.
    let staging = root.appendingPathComponent(Self.stagingPrefix + UUID().uuidString)
    do {
      try FileManager.default.moveItem(at: model.directory, to: staging)
      try FileManager.default.removeItem(at: staging)
    } catch {
      throw CFMoEError.user("\(model.manifest.name) cannot be deleted: \(error.localizedDescription)")
    }
  }
}
