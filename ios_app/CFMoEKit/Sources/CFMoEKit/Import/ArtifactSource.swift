// Where a model is imported from: a directory, a tar archive or a zip archive, all read by path.
import Foundation

protocol ArtifactSource: AnyObject {
  /// Bytes of every regular file, by path.
  var files: [String: UInt64] { get }
  /// Read in the order of these, an archive is read forward only.
  func position(of path: String) -> UInt64
  /// Hands out a file's bytes piece by piece; at most as many as `files` says.
  func read(_ path: String, _ body: (UnsafeRawBufferPointer) throws -> Void) throws
}

extension ArtifactSource {
  func position(of path: String) -> UInt64 { 0 }
}

/// Throws where `url` is neither a directory nor an archive that can be read.
func openSource(_ url: URL) throws -> any ArtifactSource {
  var isDirectory: ObjCBool = false
  guard FileManager.default.fileExists(atPath: url.path, isDirectory: &isDirectory) else {
    throw CFMoEError.user("\(url.lastPathComponent) is not there any more: choose it again")
  }
  if isDirectory.boolValue { return try DirectorySource(url) }
  let file = try InputFile(url.path)
  if let zip = try ZipSource(file) { return zip }
  if let unzipped = try GzipReader(file) {
    if let tar = try TarSource(unzipped) { return tar }
  } else if let tar = try TarSource(file) {
    return tar
  }
  throw CFMoEError.user("\(url.lastPathComponent) is no model: choose a model's directory, or its .zip, .tar or .tar.gz archive")
}

/// Only what the manifest could name: regular files, links left out.
final class DirectorySource: ArtifactSource {
  let files: [String: UInt64]
  private let root: URL

  init(_ root: URL) throws {
    self.root = root
    var files: [String: UInt64] = [:]
    guard let walk = FileManager.default.enumerator(atPath: root.path) else { throw systemError(root.lastPathComponent, "read") }
    while let path = walk.nextObject() as? String {
      let attributes = walk.fileAttributes
      guard attributes?[.type] as? FileAttributeType == .typeRegular else { continue }
      files[path] = (attributes?[.size] as? NSNumber)?.uint64Value ?? 0
      guard files.count <= mostEntries else {
        throw CFMoEError.user("\(root.lastPathComponent) holds more than \(mostEntries) files: choose the model's own directory")
      }
    }
    self.files = files
  }

  func read(_ path: String, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
    let file = try InputFile(root.appendingPathComponent(path).path)
    try file.forEachPiece(at: 0, count: min(file.size, files[path] ?? 0), body)
  }
}

let mostEntries = 100_000

/// Little-endian unsigned integers of an archive's headers.
extension Array where Element == UInt8 {
  func littleEndian(_ offset: Int, _ count: Int) -> UInt64 {
    (0..<count).reduce(0) { $0 | UInt64(self[offset + $1]) << UInt64(8 * $1) }
  }
}
