// Import: directories and archives of every kind, checksums, progress, cancellation, and what must be refused with nothing left behind.
import XCTest

@testable import CFMoEKit

final class ImportTests: XCTestCase {
  /// A small model: the files that it is made of and its manifest.
  private func manifest(_ files: [String: [UInt8]], change: (inout [String: Any]) -> Void = { _ in }) throws -> Data {
    var table: [String: Any] = [:]
    for (path, bytes) in files { table[path] = ["size": bytes.count, "sha256": sha256(bytes), "xxh3_64": "0"] as [String: Any] }
    var json: [String: Any] = [
      "format": "cfmoe-artifact", "format_version": 1, "files": table, "quantisation": ["preset": "mixed"],
      "targets": ["x": ["device": "cpu"]],
      "model": [
        "name": "tiny/model", "family": "qwen3_moe", "parameters": 12, "moe_layers": [0], "num_experts": 4, "top_k": 2, "context_size": 64,
      ] as [String: Any],
    ]
    change(&json)
    return try JSONSerialization.data(withJSONObject: json)
  }

  private let content: [String: [UInt8]] = [
    "weights.bin": (0..<100_000).map { UInt8(truncatingIfNeeded: $0 &* 7) }, "lib/x/plan.json": Array("{}".utf8), "empty": [],
  ]

  private func sha256(_ bytes: [UInt8]) -> String {
    var digest = Checksum()
    bytes.withUnsafeBytes { digest.update($0) }
    return digest.finish()
  }

  private func write(_ files: [String: [UInt8]], _ manifest: Data, to directory: URL) throws -> URL {
    for (path, bytes) in files {
      let url = directory.appendingPathComponent(path)
      try FileManager.default.createDirectory(at: url.deletingLastPathComponent(), withIntermediateDirectories: true)
      try Data(bytes).write(to: url)
    }
    try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
    try manifest.write(to: directory.appendingPathComponent(Manifest.fileName))
    return directory
  }

  private func library() throws -> ModelLibrary { try ModelLibrary(root: scratch(self).appendingPathComponent("models")) }

  private func left(_ library: ModelLibrary) throws -> [String] { try FileManager.default.contentsOfDirectory(atPath: library.root.path) }

  private func assertRefused(_ source: URL, _ part: String, file: StaticString = #filePath, line: UInt = #line) async throws {
    let library = try library()
    let message = await userError({ _ = try await ModelImporter(library: library).run(source) }, file: file, line: line)
    XCTAssert(part.isEmpty ? !message.isEmpty : message.contains(part), message, file: file, line: line)
    XCTAssertEqual(try left(library), [], file: file, line: line)
  }

  func testChecksumIsSHA256() {
    XCTAssertEqual(sha256([]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    XCTAssertEqual(sha256(Array("abc".utf8)), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    XCTAssertEqual(
      sha256(Array("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq".utf8)),
      "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1")
    XCTAssertEqual(
      sha256([UInt8](repeating: UInt8(ascii: "a"), count: 1_000_000)), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    // In pieces of any length it is the same.
    let bytes = (0..<1000).map { UInt8(truncatingIfNeeded: $0) }
    for step in [1, 7, 63, 64, 65, 128, 999] {
      var digest = Checksum()
      for begin in stride(from: 0, to: bytes.count, by: step) {
        Array(bytes[begin..<min(begin + step, 1000)]).withUnsafeBytes { digest.update($0) }
      }
      XCTAssertEqual(digest.finish(), sha256(bytes))
    }
  }

  func testDirectory() async throws {
    let source = try write(content.merging(["notes.txt": [1]]) { $1 }, manifest(content), to: scratch(self))
    let library = try library()
    let steps = Locked([ImportProgress]())
    let model = try await ModelImporter(library: library).run(source) { step in steps.with { $0.append(step) } }
    XCTAssertEqual(model.manifest.name, "tiny/model")
    XCTAssert(model.id.hasPrefix("tiny_model-"), model.id)
    XCTAssertEqual(try Data(contentsOf: model.directory.appendingPathComponent("weights.bin")), Data(content["weights.bin"]!))
    XCTAssertFalse(FileManager.default.fileExists(atPath: model.directory.appendingPathComponent("notes.txt").path))
    XCTAssertEqual(library.models().models, [model])
    let last = try XCTUnwrap(steps.with { $0.last })
    XCTAssertEqual(last.bytesDone, last.bytesTotal)
    XCTAssertEqual(last.verified.map(\.file), ["empty", "lib/x/plan.json", "weights.bin"])
    XCTAssertEqual(last.verified.last?.sha256, sha256(content["weights.bin"]!))
    // A second time it is there already.
    let again = try await ModelImporter(library: library).run(source)
    XCTAssertEqual(again, model)
    try library.delete(model)
    XCTAssertEqual(try left(library), [])
  }

  func testArchives() async throws {
    let path = try XCTUnwrap(ProcessInfo.processInfo.environment["CFMOE_ARCHIVES"], "set CFMOE_ARCHIVES to a directory of archives")
    let archives = URL(fileURLWithPath: path, isDirectory: true)
    let names = try FileManager.default.contentsOfDirectory(atPath: path).filter { $0.hasPrefix("good-") }.sorted()
    XCTAssertGreaterThanOrEqual(names.count, 13)
    var first: Manifest?
    for name in names {
      let library = try library()
      let model = try await ModelImporter(library: library).run(archives.appendingPathComponent(name))
      XCTAssertEqual(model.manifest, first ?? model.manifest, name)
      XCTAssertEqual(model.manifest.name, "tiny", name)
      XCTAssertEqual(try left(library), [model.id], name)
      first = model.manifest
    }
    // And an imported one runs.
    let library = try library()
    let model = try await ModelImporter(library: library).run(archives.appendingPathComponent("demo.zip"))
    XCTAssertEqual(model.manifest, try ModelLibrary.model(at: demoArtifact(), isBundled: false).manifest)
    let engine = try await Engine.open(artifact: model.directory)
    let session = try await engine.makeSession()
    let answer = try await collect(session.generate([1, 2, 3], maxNewTokens: 3, stopTokens: []))
    XCTAssertEqual(answer.ids.count, 3)
    await engine.close()
  }

  func testBadArchivesAreRefused() async throws {
    let path = try XCTUnwrap(ProcessInfo.processInfo.environment["CFMOE_ARCHIVES"], "set CFMOE_ARCHIVES to a directory of archives")
    let names = try FileManager.default.contentsOfDirectory(atPath: path).filter { $0.hasPrefix("bad-") }.sorted()
    XCTAssertGreaterThanOrEqual(names.count, 8)
    for name in names { try await assertRefused(URL(fileURLWithPath: path).appendingPathComponent(name), "") }
  }

  func testArchivesCutAnywhere() async throws {
    let directory = try scratch(self)
    let source = try write(content, manifest(content), to: directory.appendingPathComponent("m"))
    let tar = directory.appendingPathComponent("m.tar")
    let process = Process()
    process.executableURL = URL(fileURLWithPath: "/bin/tar")
    process.arguments = ["-C", source.path, "-cf", tar.path, "."]
    try process.run()
    process.waitUntilExit()
    let whole = try Data(contentsOf: tar)
    let model = try await ModelImporter(library: library()).run(tar)
    XCTAssertEqual(model.manifest.files.count, 3)
    let cut = directory.appendingPathComponent("cut.tar")
    for size in stride(from: 0, to: 100_000, by: 4_999) {
      try whole.prefix(size).write(to: cut)
      try await assertRefused(cut, "")
    }
    // Any byte of a header changed, and nothing gets out of the library.
    var generator = SystemRandomNumberGenerator()
    for _ in 0..<120 {
      var bytes = whole
      bytes[Int.random(in: 0..<2048, using: &generator)] = UInt8.random(in: 0...255, using: &generator)
      try bytes.write(to: cut)
      let library = try library()
      _ = try? await ModelImporter(library: library).run(cut)
      XCTAssertLessThanOrEqual(try left(library).count, 1)
      XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: library.root.deletingLastPathComponent().path), ["models"])
    }
  }

  func testDamageIsRefused() async throws {
    var damaged = content
    damaged["weights.bin"]![500] ^= 1
    try await assertRefused(write(damaged, manifest(content), to: scratch(self)), "is damaged: its SHA-256")
    var short = content
    short["weights.bin"]!.removeLast()
    try await assertRefused(write(short, manifest(content), to: scratch(self)), "its manifest says 100000")
    var lacking = content
    lacking["empty"] = nil
    try await assertRefused(write(lacking, manifest(content), to: scratch(self)), "lacks empty")
  }

  func testManifestsThatReachOutside() async throws {
    for path in ["../evil", "/etc/evil", "a/../../evil", "./x", "a//b", "a\\..\\b", "", "manifest.json", "c:evil", "a\u{1}"] {
      let files = content.merging([path: [1]]) { $1 }
      let source = try write(content, manifest(files), to: scratch(self))
      try await assertRefused(source, "outside the model")
    }
  }

  func testManifestsOfAnyBytes() throws {
    var generator = SystemRandomNumberGenerator()
    let good = try manifest(content)
    var refused = 0
    for _ in 0..<3000 {
      var bytes = good
      for _ in 0..<Int.random(in: 1...3, using: &generator) { bytes[Int.random(in: 0..<bytes.count)] = UInt8.random(in: 0...255) }
      do {
        let read = try Manifest(bytes, source: "x")
        XCTAssert(read.files.keys.allSatisfy(isInside))
      } catch is CFMoEError {
        refused += 1
      }
    }
    XCTAssertGreaterThan(refused, 1000)
    for text in ["{\"\\ud800\": 1, \"files\": {\"\\ud800\": {}}}", "[]", "", "null", String(repeating: "[", count: 100_000)] {
      XCTAssertThrowsError(try Manifest(Data(text.utf8), source: "x")) { XCTAssert($0 is CFMoEError) }
    }
  }

  func testLinksAreNotFollowed() async throws {
    let secret = try scratch(self).appendingPathComponent("secret")
    try Data(content["weights.bin"]!).write(to: secret)
    let source = try write(content, manifest(content), to: scratch(self))
    let link = source.appendingPathComponent("weights.bin")
    try FileManager.default.removeItem(at: link)
    try FileManager.default.createSymbolicLink(at: link, withDestinationURL: secret)
    try await assertRefused(source, "lacks weights.bin")
  }

  func testOtherFilesAreRefused() async throws {
    let directory = try scratch(self)
    let text = directory.appendingPathComponent("text.txt")
    try Data("This is no archive. ".utf8 + [UInt8](repeating: 65, count: 2000)).write(to: text)
    try await assertRefused(text, "is no model")
    let empty = directory.appendingPathComponent("empty.zip")
    try Data().write(to: empty)
    try await assertRefused(empty, "is no model")
    try await assertRefused(directory.appendingPathComponent("gone.zip"), "not there any more")
    try await assertRefused(directory, "holds no manifest.json")
    let other = try write([:], Data("{\"format\": 3}".utf8), to: scratch(self))
    try await assertRefused(other, "no usable field format")
    let newer = try write(content, manifest(content) { $0["format_version"] = 2 }, to: scratch(self))
    try await assertRefused(newer, "format version 2")
    let huge = try write(
      content, manifest(content) { $0["files"] = ["w": ["size": UInt64(1) << 60, "sha256": String(repeating: "0", count: 64)]] },
      to: scratch(self))
    try await assertRefused(huge, "wrong size or checksum")
  }

  func testNotEnoughRoom() async throws {
    // Sparse: the size is there, the bytes are not.
    let source = try write(
      [:], manifest([:]) { $0["files"] = ["w": ["size": UInt64(1) << 42, "sha256": String(repeating: "0", count: 64)]] }, to: scratch(self))
    XCTAssertTrue(FileManager.default.createFile(atPath: source.appendingPathComponent("w").path, contents: nil))
    let handle = try FileHandle(forWritingTo: source.appendingPathComponent("w"))
    try handle.truncate(atOffset: 1 << 42)
    try handle.close()
    try await assertRefused(source, "are free")
  }

  func testCancellationLeavesNothing() async throws {
    let big = ["w": [UInt8](repeating: 3, count: 6 << 20)]
    let source = try write(big, manifest(big), to: scratch(self))
    let library = try library()
    let began = expectation(description: "copying")
    began.assertForOverFulfill = false
    let task = Task { try await ModelImporter(library: library).run(source) { if $0.bytesDone > 0 { began.fulfill() } } }
    await fulfillment(of: [began], timeout: 60)
    task.cancel()
    do {
      _ = try await task.value
      XCTFail("it was imported")
    } catch {
      XCTAssert(error is CancellationError, "\(error)")
    }
    XCTAssertEqual(try left(library), [])
  }

  func testInterruptedImportsAreCleared() throws {
    let library = try library()
    let staging = library.root.appendingPathComponent(ModelLibrary.stagingPrefix + "x")
    try FileManager.default.createDirectory(at: staging, withIntermediateDirectories: true)
    try FileManager.default.createDirectory(at: library.root.appendingPathComponent("broken"), withIntermediateDirectories: true)
    let again = try ModelLibrary(root: library.root)
    XCTAssertEqual(try left(again), ["broken"])
    let found = again.models()
    XCTAssertEqual(found.models, [])
    XCTAssertEqual(found.problems.count, 1)
    XCTAssert(found.problems[0].contains("broken"), found.problems[0])
  }

  func testBundledModels() throws {
    let library = try ModelLibrary(root: scratch(self), bundled: [demoArtifact()])
    let models = library.models().models
    XCTAssertEqual(models.map(\.manifest.name), ["demo-moe-13m"])
    XCTAssertThrowsError(try library.delete(models[0])) { XCTAssert(CFMoEError.line(of: $0).contains("cannot be deleted")) }
  }
}
