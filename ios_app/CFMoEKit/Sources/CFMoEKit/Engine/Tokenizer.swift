// Text to token ids and back, by the artifact's own tokenizer.
import CCFMoE
import Foundation

/// May be used from any thread; a stream of tokens belongs to one generation at a time.
public final class Tokenizer: Sendable {
  private let handle: Locked<OpaquePointer>
  private static let textBytes = 64 << 10

  /// Throws where the artifact's tokenizer is of a kind that the engine does not read.
  public init(artifact: URL) throws {
    var tokenizer: OpaquePointer?
    try artifact.path.withCString { path in try checked { cfmoe_tokenizer_open(path, &tokenizer, $0, $1) } }
    handle = Locked(tokenizer!)
  }

  deinit { handle.with { cfmoe_tokenizer_close($0) } }

  /// The ids of `text`; nothing is added to them.
  public func encode(_ text: String) throws -> [Int32] {
    var bytes = Array(text.utf8CString)
    var ids = [Int32](repeating: 0, count: bytes.count)  // never more tokens than bytes
    var count = 0
    try handle.with { tokenizer in
      try checked { cfmoe_tokenizer_encode(tokenizer, &bytes, bytes.count - 1, &ids, ids.count, &count, $0, $1) }
    }
    return Array(ids.prefix(count))
  }

  /// The ids of the text that `pieces` make; special tokens in what was typed are text.
  public func encode(_ pieces: [Piece]) throws -> [Int32] {
    var bytes: [UInt8] = []
    var plain: [Int] = []
    for piece in pieces {
      let begin = bytes.count
      bytes += Array(piece.text.utf8)
      if piece.typed { plain += [begin, bytes.count] }
    }
    var ids = [Int32](repeating: 0, count: bytes.count + 1)  // never more tokens than bytes
    var count = 0
    try handle.with { tokenizer in
      try checked { line, size in
        bytes.withUnsafeBytes { text in
          cfmoe_tokenizer_encode_typed(
            tokenizer, text.bindMemory(to: CChar.self).baseAddress, bytes.count, plain, plain.count / 2, &ids, ids.count, &count, line,
            size)
        }
      }
    }
    return Array(ids.prefix(count))
  }

  /// The whole characters that `token` completes.
  public func push(_ token: Int32) throws -> String {
    var text = [CChar](repeating: 0, count: Self.textBytes)
    var size = 0
    try handle.with { tokenizer in try checked { cfmoe_tokenizer_push(tokenizer, token, &text, text.count, &size, $0, $1) } }
    return String(decoding: text.prefix(size).map { UInt8(bitPattern: $0) }, as: UTF8.self)
  }

  /// Ends the stream of tokens with what an unfinished character left.
  public func finish() throws -> String { try push(-1) }
}
