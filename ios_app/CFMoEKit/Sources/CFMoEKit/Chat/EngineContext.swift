// What the open engine has of the conversation, and what it has to be told so that it has all of it.
import Foundation

/// `pieces` go behind the first `position` tokens of what the engine has; what follows those it is to forget first.
struct Telling: Equatable, Sendable {
  var pieces: [Piece]
  var position: Int
}

struct EngineContext {
  /// What the engine had read and written after each answer, and in how many tokens.
  private var marks: [(text: String, position: Int)] = []
  private var asked = ""

  /// The engine has nothing, or nobody knows what.
  mutating func lost() { marks = [] }

  /// What is new behind the longest beginning that the engine has, byte for byte.
  mutating func tell(_ prompt: [Piece]) -> Telling {
    asked = prompt.map(\.text).joined()
    while let mark = marks.last, !continues(mark.text) { marks.removeLast() }
    guard let mark = marks.last else { return Telling(pieces: prompt, position: 0) }
    var skip = mark.text.utf8.count
    let rest = prompt.compactMap { piece -> Piece? in
      let cut = min(skip, piece.text.utf8.count)
      skip -= cut
      guard cut < piece.text.utf8.count else { return nil }
      return Piece(String(decoding: piece.text.utf8.dropFirst(cut), as: UTF8.self), typed: piece.typed)
    }
    return Telling(pieces: rest, position: mark.position)
  }

  /// The engine has answered what was told last, and has `position` tokens now.
  mutating func answered(_ answer: String, position: Int) { marks.append((asked + answer, position)) }

  private func continues(_ text: String) -> Bool { asked.utf8.count > text.utf8.count && asked.utf8.starts(with: text.utf8) }
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
