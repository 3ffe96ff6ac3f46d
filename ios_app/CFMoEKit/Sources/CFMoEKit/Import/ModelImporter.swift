// Copies a model into the library: every file's checksum is computed while it is copied, and the model appears only when all of them are
// right.
import Foundation

public struct ImportProgress: Equatable, Sendable {
  public var model = ""
  /// The file that is being copied.
  public var file = ""
  public var bytesDone: UInt64 = 0
  public var bytesTotal: UInt64 = 0
  /// Files whose SHA-256 was found right, in order.
  public var verified: [Verified] = []

  public struct Verified: Equatable, Sendable {
    public var file: String
    public var sha256: String
  }

  public var fraction: Double { bytesTotal > 0 ? Double(bytesDone) / Double(bytesTotal) : 0 }
}

public struct ModelImporter: Sendable {
  public let library: ModelLibrary

  public init(library: ModelLibrary) { self.library = library }

  /// source: a model's directory, or a .zip, .tar or .tar.gz archive of it. `progress` is called from another thread, at most about once
  /// per MiB.
  /// A model that is there already is returned as it is. Cancelling the task leaves nothing behind and throws `CancellationError`.
  public func run(_ source: URL, progress: @escaping @Sendable (ImportProgress) -> Void = { _ in }) async throws -> InstalledModel {
    let cancelled = Locked(false)
    return try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { continuation in
        DispatchQueue.global(qos: .userInitiated).async { [library] in
          continuation.resume(
            with: Result {
              try Import(library: library, isCancelled: { cancelled.with { $0 } }, progress: progress).run(source)
            })
        }
      }
    } onCancel: {
      cancelled.with { $0 = true }
    }
  }
}

private struct Import {
  let library: ModelLibrary
  let isCancelled: () -> Bool
  let progress: (ImportProgress) -> Void

  func run(_ url: URL) throws -> InstalledModel {
    let source = try openSource(url)
    let name = url.lastPathComponent
    // The model may lie in a directory of the archive; the outermost manifest counts.
    guard
      let manifestPath = source.files.keys.filter({ $0 == Manifest.fileName || $0.hasSuffix("/" + Manifest.fileName) })
        .min(by: { ($0.utf8.count, $0) < ($1.utf8.count, $1) })
    else { throw CFMoEError.user("\(name) holds no \(Manifest.fileName): choose a model that `cfmoe compile` wrote") }
    let prefix = String(manifestPath.dropLast(Manifest.fileName.count))
    guard source.files[manifestPath]! <= Manifest.mostBytes else {
      throw CFMoEError.user("\(name): \(Manifest.fileName) has \(source.files[manifestPath]!) bytes: it is no manifest")
    }
    var data = Data()
    try source.read(manifestPath) { data.append(contentsOf: $0) }
    let manifest = try Manifest(data, source: "\(name)/\(manifestPath)")
    for (path, file) in manifest.files {
      guard let size = source.files[prefix + path] else { throw CFMoEError.user("\(name) lacks \(path): copy the model again") }
      guard size == file.size else {
        throw CFMoEError.user("\(name): \(path) has \(size) bytes, its manifest says \(file.size): copy the model again")
      }
    }
    var digest = Checksum()
    data.withUnsafeBytes { digest.update($0) }
    let id = "\(safeName(manifest.name))-\(digest.finish().prefix(12))"
    let final = library.root.appendingPathComponent(id, isDirectory: true)
    if FileManager.default.fileExists(atPath: final.path) { return try ModelLibrary.model(at: final, isBundled: false) }
    try checkRoom(manifest)

    let staging = library.root.appendingPathComponent(ModelLibrary.stagingPrefix + UUID().uuidString, isDirectory: true)
    do {
      try copy(source, prefix, manifest, to: staging)
      try write(data, to: staging.appendingPathComponent(Manifest.fileName))
      guard !isCancelled() else { throw CancellationError() }
      guard rename(staging.path, final.path) == 0 else { throw systemError(final.path, "written") }
    } catch {
      // What cannot be removed now is cleared when the library is opened next.
      try? FileManager.default.removeItem(at: staging)
      throw error
    }
    return try ModelLibrary.model(at: final, isBundled: false)
  }

  private func copy(_ source: any ArtifactSource, _ prefix: String, _ manifest: Manifest, to staging: URL) throws {
    var state = ImportProgress(model: manifest.name, bytesTotal: manifest.totalBytes)
    try FileManager.default.createDirectory(at: staging, withIntermediateDirectories: false)
    let order = manifest.files.sorted { (source.position(of: prefix + $0.key), $0.key) < (source.position(of: prefix + $1.key), $1.key) }
    for (path, file) in order {
      state.file = path
      progress(state)
      let out = staging.appendingPathComponent(path)
      try FileManager.default.createDirectory(at: out.deletingLastPathComponent(), withIntermediateDirectories: true)
      let output = try OutputFile(out.path)
      var digest = Checksum()
      var reported = state.bytesDone
      try source.read(prefix + path) { piece in
        guard !isCancelled() else { throw CancellationError() }
        digest.update(piece)
        try output.write(piece)
        state.bytesDone += UInt64(piece.count)
        if state.bytesDone - reported >= 1 << 20 {
          reported = state.bytesDone
          progress(state)
        }
      }
      try output.synchronise()
      let found = digest.finish()
      guard found == file.sha256 else {
        let digests = "its SHA-256 is \(found.prefix(16))…, the manifest says \(file.sha256.prefix(16))…"
        throw CFMoEError.user("\(path) is damaged: \(digests): copy the model again")
      }
      state.verified.append(.init(file: path, sha256: found))
      progress(state)
    }
  }

  private func write(_ data: Data, to url: URL) throws {
    let output = try OutputFile(url.path)
    try data.withUnsafeBytes { try output.write($0) }
    try output.synchronise()
  }

  private func checkRoom(_ manifest: Manifest) throws {
    let attributes = try? FileManager.default.attributesOfFileSystem(forPath: library.root.path)
    guard let free = (attributes?[.systemFreeSize] as? NSNumber)?.uint64Value, free < manifest.totalBytes else { return }
    throw CFMoEError.user(
      "\(manifest.name) needs \(manifest.totalBytes) bytes, \(free) are free: "
        + "free \((manifest.totalBytes - free) >> 20) MiB and import it again")
  }

  /// A directory's name from a model's: letters, digits and a few signs, at most 64.
  private func safeName(_ name: String) -> String {
    let kept = name.unicodeScalars.prefix(64).map { scalar -> Character in
      let isPlain = scalar.isASCII && (scalar.properties.isAlphabetic || ("0"..."9").contains(scalar) || scalar == "-" || scalar == "_")
      return isPlain ? Character(scalar) : "_"
    }
    return kept.isEmpty ? "model" : String(kept)
  }
}
