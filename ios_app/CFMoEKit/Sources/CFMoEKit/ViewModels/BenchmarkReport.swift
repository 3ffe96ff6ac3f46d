// The benchmark's JSON: the fields of `cfmoe-engine bench --json`, and what machine it was.
import Foundation

public struct BenchmarkReport: Equatable, Sendable, Encodable {
  public var model: String
  /// Such as "iPhone15,2".
  public var machine: String
  public var system: String
  public var date: String
  public var results: [BenchmarkResult] = []

  public func json() throws -> Data {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.prettyPrinted, .sortedKeys, .withoutEscapingSlashes]
    return try encoder.encode(self)
  }
}

public struct BenchmarkResult: Equatable, Identifiable, Sendable, Encodable {
  /// As it was asked for, such as "50%".
  public var memoryBudget: String
  public var io: String
  public var policy: String
  public var warning: String
  public var prefillDevice: String
  public var decodeDevice: String
  /// Of the GPU; empty if none is used.
  public var deviceName: String
  public var promptTokens: Int
  public var newTokens: Int
  public var tokenIDs: [Int32]
  public var metrics: Metrics
  /// Reading the prompt again, its experts in memory as far as the budget goes; 0 where the context has no room for it.
  public var secondPrefillTokensPerSecond: Double
  public var memory: Memory

  public var id: String { memoryBudget }

  enum CodingKeys: String, CodingKey {
    case memoryBudget = "memory_budget"
    case io, policy, warning
    case prefillDevice = "prefill_device"
    case decodeDevice = "decode_device"
    case deviceName = "device_name"
    case promptTokens = "prompt_tokens"
    case newTokens = "new_tokens"
    case tokenIDs = "token_ids"
    case metrics
    case secondPrefillTokensPerSecond = "second_prefill_tokens_per_s"
    case memory
  }
}
