// How answers are made: what a user can set, in which bounds, and what the model's authors recommend.
import Foundation

public struct GenerationSettings: Equatable, Codable, Sendable {
  public var greedy = true
  public var temperature = 1.0
  public var topK = 50
  public var topP = 1.0
  public var repetitionPenalty = 1.0
  /// nil: another one for each answer.
  public var seed: UInt32?
  public var maxNewTokens = 512
  /// nil: what the chat template itself says.
  public var system: String?

  public init() {}

  /// nil: no number is set.
  public subscript(field: SettingField) -> Double? {
    get {
      switch field {
      case .temperature: return temperature
      case .topK: return Double(topK)
      case .topP: return topP
      case .repetitionPenalty: return repetitionPenalty
      case .seed: return seed.map(Double.init)
      case .maxNewTokens: return Double(maxNewTokens)
      }
    }
    /// `newValue` is within the bounds; nil only for a seed.
    set {
      switch field {
      case .temperature: temperature = newValue ?? temperature
      case .topK: topK = newValue.map { Int($0) } ?? topK
      case .topP: topP = newValue ?? topP
      case .repetitionPenalty: repetitionPenalty = newValue ?? repetitionPenalty
      case .seed: seed = newValue.map { UInt32($0) }
      case .maxNewTokens: maxNewTokens = newValue.map { Int($0) } ?? maxNewTokens
      }
    }
  }

  var isWithinBounds: Bool {
    SettingField.allCases.allSatisfy { field in self[field].map { field.range.contains($0) } ?? (field == .seed) }
  }

  /// For one answer.
  func sampling() -> Sampling {
    Sampling(
      temperature: greedy ? 0 : Float(temperature), topK: Int32(topK), topP: Float(topP), repetitionPenalty: Float(repetitionPenalty),
      seed: UInt64(seed ?? UInt32.random(in: .min ... .max)))
  }

  /// What the model's generation_config.json recommends, as transformers reads it; `otherwise` where it says nothing, or what is no value.
  static func recommended(_ file: URL, otherwise: GenerationSettings) -> GenerationSettings {
    guard let data = try? Data(contentsOf: file), let json = try? JSONSerialization.jsonObject(with: data) as? [String: Any] else {
      return otherwise
    }
    var settings = otherwise
    settings.greedy = !(json["do_sample"] as? Bool ?? !otherwise.greedy)
    for field in SettingField.allCases where field != .seed {
      guard let number = json[field.rawValue] as? NSNumber, let value = field.value(number.doubleValue) else { continue }
      settings[field] = value
    }
    return settings
  }
}

/// A number that can be set, by its name in generation_config.json.
public enum SettingField: String, CaseIterable, Sendable {
  case temperature
  case topK = "top_k"
  case topP = "top_p"
  case repetitionPenalty = "repetition_penalty"
  case seed
  case maxNewTokens = "max_new_tokens"

  /// The bounds, both allowed.
  public var range: ClosedRange<Double> {
    switch self {
    case .temperature: return 0.01...5
    case .topK: return 0...1000
    case .topP: return 0.01...1
    case .repetitionPenalty: return 0.5...2
    case .seed: return 0...4_294_967_295
    case .maxNewTokens: return 1...32768
    }
  }

  public var isWhole: Bool { self == .topK || self == .seed || self == .maxNewTokens }

  func value(_ number: Double) -> Double? {
    range.contains(number) && (!isWhole || number == number.rounded(.down)) ? number : nil
  }

  /// The number, or nil where `text` is none within the bounds. A comma does for a point.
  public func value(_ text: String) -> Double? {
    let point = text.filter { !$0.isWhitespace }.map { $0 == "," ? "." : $0 }
    return Double(String(point)).flatMap { value($0) }
  }

  /// A value as it stands in a field: no fraction where there is none.
  public func text(_ value: Double) -> String { value == value.rounded(.down) ? String(Int(value)) : String(value) }

  /// What is allowed, for people.
  public var rule: String {
    "Give a \(isWhole ? "whole number" : "number") from \(text(range.lowerBound)) to \(text(range.upperBound))"
  }
}

/// What was set, by a model's id, as a file.
struct SettingsStore: Sendable {
  /// nil: nothing is kept.
  let file: URL?

  /// None where there is no file, or none that can be read.
  func read() -> [String: GenerationSettings] {
    guard let file, let data = try? Data(contentsOf: file) else { return [:] }
    let all = (try? JSONDecoder().decode([String: GenerationSettings].self, from: data)) ?? [:]
    return all.filter { $0.value.isWithinBounds }
  }

  func write(_ settings: [String: GenerationSettings]) throws {
    guard let file else { return }
    do {
      try JSONEncoder().encode(settings).write(to: file, options: .atomic)
    } catch {
      throw CFMoEError.user("the settings cannot be kept: \(error.localizedDescription)")
    }
  }
}
