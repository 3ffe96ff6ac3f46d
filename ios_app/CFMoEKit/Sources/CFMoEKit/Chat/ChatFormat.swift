// How a conversation is written for a model: the manifest's `chat`, docs/artifact-format.md.
import Foundation

/// A part of a prompt. In what was typed special tokens are text.
public struct Piece: Equatable, Sendable {
  public var text: String
  public var typed: Bool

  public init(_ text: String, typed: Bool = false) {
    self.text = text
    self.typed = typed
  }
}

/// A question and, but for the last, its answer.
public struct Turn: Equatable, Sendable {
  public var user: String
  public var answer: String?
}

/// A day of the calendar that everybody means.
public struct Day: Equatable, Sendable {
  public var year: Int
  public var month: Int
  public var day: Int

  public static func today() -> Day {
    let now = calendar(.current).dateComponents([.year, .month, .day], from: Date())
    return Day(year: now.year ?? 1970, month: now.month ?? 1, day: now.day ?? 1)
  }

  fileprivate static func calendar(_ zone: TimeZone) -> Calendar {
    var calendar = Calendar(identifier: .gregorian)
    calendar.timeZone = zone
    return calendar
  }

  /// strftime with English names on every machine.
  func text(_ format: String) -> String {
    let parts = format.split(separator: "%", omittingEmptySubsequences: false)
    return parts.dropFirst().reduce(String(parts[0])) { $0 + directive($1.first) + $1.dropFirst() }
  }

  private func directive(_ name: Character?) -> String {
    switch name {
    case "Y": return padded(year, 4)
    case "m": return padded(month, 2)
    case "d": return padded(day, 2)
    case "j": return padded(ordinal(.day, in: .year), 3)
    case "B": return Self.months[month - 1]
    case "b": return String(Self.months[month - 1].prefix(3))
    default: return Self.days[ordinal(.weekday, in: .weekOfYear) - 1]
    }
  }

  private func ordinal(_ unit: Calendar.Component, in whole: Calendar.Component) -> Int {
    let calendar = Self.calendar(TimeZone(secondsFromGMT: 0) ?? .current)
    guard let date = calendar.date(from: DateComponents(year: year, month: month, day: day)) else { return 1 }
    return unit == .weekday ? calendar.component(.weekday, from: date) : calendar.ordinality(of: unit, in: whole, for: date) ?? 1
  }

  private func padded(_ number: Int, _ digits: Int) -> String {
    let text = String(number)
    return String(repeating: "0", count: max(0, digits - text.count)) + text
  }

  private static let months = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
  ]
  private static let days = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
}

/// The texts stand so: begin, user, replied, answer, next, user, reply, and the new answer follows.
public struct ChatFormat: Equatable, Sendable {
  /// `standard` is the text that the template takes by itself; `empty` stands in front where the text is to be empty.
  public struct System: Equatable, Sendable {
    public var before: String
    public var after: String
    public var empty: String
    public var standard: String
    public var trim: Bool
  }

  public enum ThinkingTrim: String, Sendable { case none, newlines, all }

  public var begin = ""
  public var reply = ""
  public var replied = ""
  public var next = ""
  public var system: System?
  public var trimUser = false
  public var trimAnswer = false
  public var thinkingEnd = ""
  public var thinkingTrim = ThinkingTrim.none
  public var dateFormat = ""
  /// nil: the model's own.
  public var stopTokenIDs: [Int32]?
  public var stopStrings: [String] = []

  /// A model without a chat template continues text.
  public static let plain = ChatFormat()

  static let dateMark: Unicode.Scalar = "\u{E000}"
  private static let directives = "YmdBbjA"
  private static let mostText = 16 << 10
  private static let mostStops = 64
  private static let mostShort = 256
  // What Python's str.strip takes away, which is what templates trim with.
  private static let whitespace: Set<UInt32> = Set(
    [0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000] + Array(0x09...0x0D) + Array(0x1C...0x1F) + Array(0x2000...0x200A))

  private init() {}

  /// Throws where `fields` are not what docs/artifact-format.md says.
  init(_ fields: Fields, vocabSize: UInt64) throws {
    func text(_ name: String, of fields: Fields, most: Int = Self.mostText) throws -> String {
      let text = try fields.text(name)
      guard text.unicodeScalars.count <= most else { throw fields.wrong(name) }
      return text
    }
    begin = try text("begin", of: fields)
    reply = try text("reply", of: fields)
    replied = try text("replied", of: fields)
    next = try text("next", of: fields)
    if !fields.isNull("system") {
      let system = try fields.object("system")
      self.system = System(
        before: try text("before", of: system), after: try text("after", of: system), empty: try text("empty", of: system),
        standard: try text("default", of: system), trim: try system.boolean("trim"))
    }
    trimUser = try fields.boolean("trim_user")
    trimAnswer = try fields.boolean("trim_answer")
    thinkingEnd = try text("thinking_end", of: fields, most: Self.mostShort)
    guard let trim = ThinkingTrim(rawValue: try fields.text("thinking_trim")) else { throw fields.wrong("thinking_trim") }
    thinkingTrim = trim
    dateFormat = try text("date_format", of: fields, most: Self.mostShort)
    let parts = dateFormat.split(separator: "%", omittingEmptySubsequences: false).dropFirst()
    guard parts.allSatisfy({ $0.first.map(Self.directives.contains) ?? false }) else { throw fields.wrong("date_format") }
    let ids = try fields.integers("stop_token_ids")
    guard ids.count <= Self.mostStops, ids.allSatisfy({ $0 < min(vocabSize, 1 << 31) }) else { throw fields.wrong("stop_token_ids") }
    stopTokenIDs = ids.map { Int32($0) }
    stopStrings = try fields.texts("stop_strings")
    let lengths = stopStrings.map(\.unicodeScalars.count)
    guard lengths.count <= Self.mostStops, lengths.allSatisfy((1...Self.mostShort).contains) else { throw fields.wrong("stop_strings") }
  }

  /// All turns, of which the last has no answer. `system` nil leaves the system's text to the template.
  public func prompt(_ turns: [Turn], system: String?, today: Day) -> [Piece] {
    var pieces: [Piece] = []
    if let system, let given = self.system {
      if system.isEmpty {
        pieces.append(Piece(given.empty))
      } else {
        pieces += [Piece(given.before), Piece(given.trim ? Self.trimmed(system) : system, typed: true), Piece(given.after)]
      }
    } else {
      pieces.append(Piece(begin))
    }
    for turn in turns {
      pieces.append(Piece(trimUser ? Self.trimmed(turn.user) : turn.user, typed: true))
      if let answer = turn.answer {
        pieces += [Piece(replied), Piece(past(answer), typed: true), Piece(next)]
      } else {
        pieces.append(Piece(reply))
      }
    }
    return pieces.map { $0.typed ? $0 : Piece(dated($0.text, today)) }.filter { !$0.text.isEmpty }
  }

  /// An answer as the template takes it: what stands before it in the past anyway, often a space, the model has written itself.
  func said(_ answer: String) -> String {
    guard replied.utf8.starts(with: reply.utf8) else { return answer }
    let own = replied.utf8.dropFirst(reply.utf8.count)
    return answer.utf8.starts(with: own) ? String(decoding: answer.utf8.dropFirst(own.count), as: UTF8.self) : answer
  }

  /// What stays of an answer once it lies in the past.
  public func past(_ answer: String) -> String {
    var kept = answer
    if !thinkingEnd.isEmpty, let end = answer.range(of: thinkingEnd, options: [.backwards, .literal]) {
      kept = String(answer[end.upperBound...])
      switch thinkingTrim {
      case .none: break
      case .newlines: kept = Self.trimmedInFront(kept) { $0 == "\n" }
      case .all: kept = Self.trimmedInFront(kept, Self.isWhitespace)
      }
    }
    return trimAnswer ? Self.trimmed(kept) : kept
  }

  /// Thoughts in front of an answer, and what it says; all of it is thought while it still thinks.
  public func parts(_ answer: String) -> (thoughts: String, said: String) {
    guard !thinkingEnd.isEmpty else { return ("", answer) }
    if let end = answer.range(of: thinkingEnd, options: [.backwards, .literal]) {
      return (String(answer[..<end.upperBound]), String(answer[end.upperBound...]))
    }
    let begin = thinkingEnd.filter { $0 != "/" }
    let isThinking = reply.contains(begin) || answer.drop { $0.isWhitespace }.hasPrefix(begin)
    return isThinking ? (answer, "") : ("", answer)
  }

  /// `text` with the date of `today` where the template has one.
  public func dated(_ text: String, _ today: Day) -> String {
    guard text.unicodeScalars.contains(Self.dateMark) else { return text }
    let date = today.text(dateFormat)
    return text.unicodeScalars.reduce(into: "") { out, scalar in
      if scalar == Self.dateMark { out += date } else { out.unicodeScalars.append(scalar) }
    }
  }

  private static func isWhitespace(_ scalar: Unicode.Scalar) -> Bool { whitespace.contains(scalar.value) }

  // By scalars: a carriage return and its line feed are one Character.
  private static func trimmedInFront(_ text: String, _ isBlank: (Unicode.Scalar) -> Bool) -> String {
    String(String.UnicodeScalarView(text.unicodeScalars.drop(while: isBlank)))
  }

  private static func trimmed(_ text: String) -> String {
    var scalars = text.unicodeScalars.drop(while: isWhitespace)
    while let last = scalars.last, isWhitespace(last) { scalars.removeLast() }
    return String(String.UnicodeScalarView(scalars))
  }
}
