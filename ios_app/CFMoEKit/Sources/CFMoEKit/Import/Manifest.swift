// What an artifact's manifest.json says, checked before any of it is used.
import Foundation

public struct Manifest: Equatable, Sendable {
  public struct File: Equatable, Sendable {
    public var size: UInt64
    public var sha256: String
  }

  public var name: String
  public var family: String
  public var parameters: UInt64
  public var moeLayers: Int
  public var numExperts: Int
  public var topK: Int
  public var contextSize: Int
  public var quantisation: String
  /// Devices that the artifact has kernels for: cpu, metal, …
  public var devices: [String]
  /// nil: the model has no chat template, or one that says more than `chat` can; then `chatAbsent` says what.
  public var chat: ChatFormat?
  public var chatAbsent: String
  /// By path inside the artifact; all but the manifest itself.
  public var files: [String: File]

  public var totalBytes: UInt64 { files.values.reduce(0) { $0 + $1.size } }

  public static let fileName = "manifest.json"
  static let mostBytes: UInt64 = 64 << 20
  private static let mostFiles = 10_000
  private static let mostFileBytes: UInt64 = 1 << 48

  /// source: what the data came from, for the error's line.
  public init(_ data: Data, source: String) throws {
    let root = try Fields(data, source: source)
    let format = try root.text("format")
    guard format == "cfmoe-artifact" else {
      throw CFMoEError.user("\(source) has the format \(format): give a model that `cfmoe compile` wrote")
    }
    let version = try root.integer("format_version")
    guard version == 1 else {
      throw CFMoEError.user("\(source) has format version \(version), this app reads version 1: compile the model again, or update the app")
    }
    let table = try root.objects("files")
    guard table.count <= Self.mostFiles else { throw CFMoEError.user("\(source) names \(table.count) files: it is damaged") }
    files = [:]
    for (path, row) in table {
      guard isInside(path), path != Self.fileName else {
        throw CFMoEError.user(
          "\(source) names the file \(path.debugDescription), which is outside the model: it is damaged or meant to do harm")
      }
      let file = File(size: try row.integer("size"), sha256: try row.text("sha256").lowercased())
      guard file.size <= Self.mostFileBytes, file.sha256.utf8.count == 64 else {
        throw CFMoEError.user("\(source) has a wrong size or checksum for \(path): compile the model again")
      }
      files[path] = file
    }
    let model = try root.object("model")
    name = try model.text("name")
    family = try model.text("family")
    parameters = try model.integer("parameters")
    moeLayers = try model.count("moe_layers")
    numExperts = Int(clamping: try model.integer("num_experts"))
    topK = Int(clamping: try model.integer("top_k"))
    contextSize = Int(clamping: try model.integer("context_size"))
    quantisation = try root.object("quantisation").text("preset")
    chat = root.isNull("chat") ? nil : try ChatFormat(root.object("chat"), vocabSize: model.integer("vocab_size"))
    chatAbsent = root.isNull("chat_absent") ? "" : try root.text("chat_absent")
    devices = Set(try root.objects("targets").values.map { try $0.text("device") }).sorted()
  }
}

/// A JSON object whose fields are checked when they are taken.
struct Fields {
  private let values: [String: Any]
  private let source: String

  /// Not by JSONDecoder, which ends the process over a key that is no UTF-8.
  init(_ data: Data, source: String) throws {
    guard let values = try? JSONSerialization.jsonObject(with: data) as? [String: Any] else {
      throw CFMoEError.user("\(source) is no JSON object: give what `cfmoe compile` wrote")
    }
    self.init(values, source)
  }

  private init(_ values: [String: Any], _ source: String) {
    self.values = values
    self.source = source
  }

  func text(_ name: String) throws -> String {
    guard let text = values[name] as? String else { throw wrong(name) }
    return text
  }

  func integer(_ name: String) throws -> UInt64 {
    guard let number = values[name] as? NSNumber, let value = UInt64(exactly: number.doubleValue) else { throw wrong(name) }
    return value
  }

  /// Whether the field is null or missing.
  func isNull(_ name: String) -> Bool { values[name] == nil || values[name] is NSNull }

  func boolean(_ name: String) throws -> Bool {
    guard let value = values[name] as? Bool else { throw wrong(name) }
    return value
  }

  func texts(_ name: String) throws -> [String] {
    guard let list = values[name] as? [String] else { throw wrong(name) }
    return list
  }

  func integers(_ name: String) throws -> [UInt64] {
    guard let list = values[name] as? [NSNumber] else { throw wrong(name) }
    return try list.map { number in
      guard let value = UInt64(exactly: number.doubleValue) else { throw wrong(name) }
      return value
    }
  }

  func count(_ name: String) throws -> Int {
    guard let list = values[name] as? [Any] else { throw wrong(name) }
    return list.count
  }

  func object(_ name: String) throws -> Fields {
    guard let object = values[name] as? [String: Any] else { throw wrong(name) }
    return Fields(object, source)
  }

  func objects(_ name: String) throws -> [String: Fields] {
    try object(name).values.mapValues { value in
      guard let object = value as? [String: Any] else { throw wrong(name) }
      return Fields(object, source)
    }
  }

  func wrong(_ name: String) -> CFMoEError {
    .user("\(source) has no usable field \(name): give what `cfmoe compile` wrote")
  }
}

/// Whether a path of an artifact or archive stays inside the directory that it is relative to.
func isInside(_ path: String) -> Bool {
  guard !path.isEmpty, path.utf8.count <= 1024, !path.contains("\\"), !path.contains(":") else { return false }
  guard path.unicodeScalars.allSatisfy({ $0.value >= 32 }) else { return false }
  return path.split(separator: "/", omittingEmptySubsequences: false).allSatisfy { !$0.isEmpty && $0 != "." && $0 != ".." }
}
