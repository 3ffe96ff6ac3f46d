// What the open engine has of the conversation, and what it has to be told so that it has all of it.
import Foundation

/// `reset`: the engine is to forget first what it has.
struct Telling: Equatable, Sendable {
  var pieces: [Piece]
  var reset: Bool
}

struct EngineContext {
  /// All that the engine has read and written; nil: not known.
  private var known: String? = ""
  private var asked = ""

  /// A fresh engine, or one that has forgotten everything.
  mutating func emptied() { known = "" }

  /// Only what is new where the engine has the rest, byte for byte; else everything. The context is lost until `answered`.
  mutating func tell(_ prompt: [Piece]) -> Telling {
    let before = known
    asked = prompt.map(\.text).joined()
    known = nil
    guard let before, asked.utf8.starts(with: before.utf8) else { return Telling(pieces: prompt, reset: true) }
    var skip = before.utf8.count
    let rest = prompt.compactMap { piece -> Piece? in
      let cut = min(skip, piece.text.utf8.count)
      skip -= cut
      guard cut < piece.text.utf8.count else { return nil }
      return Piece(String(decoding: piece.text.utf8.dropFirst(cut), as: UTF8.self), typed: piece.typed)
    }
    return Telling(pieces: rest, reset: false)
  }

  /// The engine has answered what was told last.
  mutating func answered(_ answer: String) { known = asked + answer }
}

/// Finds in an answer that comes in parts the first of the texts that end it.
struct StopText {
  /// Whether one was found: what follows is not of the answer.
  private(set) var found = false
  private let stops: [[UInt8]]
  private var held: [UInt8] = []

  init(_ stops: [String]) { self.stops = stops.map { Array($0.utf8) } }

  /// What can be shown now: what may still become a stop is held back.
  mutating func push(_ text: String) -> String {
    if found { return "" }
    if stops.isEmpty { return text }
    held += Array(text.utf8)
    for begin in held.indices where stops.contains(where: { held[begin...].starts(with: $0) }) {
      found = true
      defer { held = [] }
      return String(decoding: held[..<begin], as: UTF8.self)
    }
    let kept = held.indices.first { begin in stops.contains { $0.starts(with: held[begin...]) } } ?? held.count
    defer { held = Array(held[kept...]) }
    return String(decoding: held[..<kept], as: UTF8.self)
  }

  /// The answer has ended: what was held back belongs to it.
  mutating func flush() -> String {
    defer { held = [] }
    return String(decoding: held, as: UTF8.self)
  }
}
