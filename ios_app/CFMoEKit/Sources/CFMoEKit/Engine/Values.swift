// What goes into the engine and what it tells, as plain values. All sizes are bytes.
import CCFMoE
import Foundation

/// How much memory the engine may take: weights, KV cache, workspace and experts together.
public enum MemoryBudget: Equatable, Sendable {
  /// All experts, as far as memory goes.
  case automatic
  case bytes(UInt64)
  /// The fixed parts, and slots for so many percent of the experts.
  case expertPercent(Double)

  var arguments: (bytes: UInt64, percent: Double) {
    switch self {
    case .automatic: return (0, 0)
    case .bytes(let bytes): return (bytes, 0)
    case .expertPercent(let percent): return (0, percent)
    }
  }
}

/// What computes. An artifact has kernels for some of them.
public enum Device: String, CaseIterable, Equatable, Sendable {
  case cpu, metal, vulkan, opencl

  /// Whether this machine has one that the engine can use.
  public var isUsable: Bool {
    if self == .cpu { return true }
    var size = 0
    guard (try? checked { cfmoe_devices(rawValue, nil, 0, &size, $0, $1) }) != nil else { return false }
    return size > "[]".utf8.count
  }

  public static func usable() -> [Device] { allCases.filter(\.isUsable) }
}

/// Which device reads prompts and which writes answers; GPUs are often the better readers only.
public struct Placement: Hashable, Sendable {
  public var prefill: Device
  public var decode: Device

  public static let cpu = Placement(.cpu)

  public init(_ device: Device) { self.init(prefill: device, decode: device) }

  public init(prefill: Device, decode: Device) {
    self.prefill = prefill
    self.decode = decode
  }

  /// What can be chosen where there are `devices`: each alone, and each GPU as the reader of prompts.
  public static func choices(_ devices: [Device]) -> [Placement] {
    let readers = devices.contains(.cpu) ? devices.filter { $0 != .cpu }.map { Placement(prefill: $0, decode: .cpu) } : []
    return devices.map { Placement($0) } + readers
  }
}

public struct EngineOptions: Equatable, Sendable {
  public var budget: MemoryBudget
  public var placement: Placement
  /// Tokens; 0 for the model's own, at most 4,096.
  public var contextSize: UInt32
  /// 0 for one per physical core.
  public var threads: Int32
  /// nil for the engine's default.
  public var policy: String?

  public init(
    budget: MemoryBudget = .automatic, placement: Placement = .cpu, contextSize: UInt32 = 0, threads: Int32 = 0, policy: String? = nil
  ) {
    self.budget = budget
    self.placement = placement
    self.contextSize = contextSize
    self.threads = threads
    self.policy = policy
  }
}

public struct Memory: Equatable, Sendable {
  public var budgetBytes: UInt64
  public var smallestBudgetBytes: UInt64
  public var largestBudgetBytes: UInt64
  public var weightsBytes: UInt64
  public var kvBytes: UInt64
  public var workspaceBytes: UInt64
  public var poolBytes: UInt64
  public var arenaBytes: UInt64
  public var mappedBytes: UInt64
  public var expertSlots: Int
  public var expertTotal: Int

  init(_ c: cfmoe_memory) {
    budgetBytes = c.budget_bytes
    smallestBudgetBytes = c.smallest_budget_bytes
    largestBudgetBytes = c.largest_budget_bytes
    weightsBytes = c.weights_bytes
    kvBytes = c.kv_bytes
    workspaceBytes = c.workspace_bytes
    poolBytes = c.pool_bytes
    arenaBytes = c.arena_bytes
    mappedBytes = c.mapped_bytes
    expertSlots = Int(c.expert_slots)
    expertTotal = Int(c.expert_total)
  }
}

/// What one phase has cost since the conversation began.
public struct PhaseMetrics: Equatable, Sendable {
  public var tokens: UInt64 = 0
  public var seconds: Double = 0
  public var hits: UInt64 = 0
  public var misses: UInt64 = 0
  public var prefetched: UInt64 = 0
  public var bytesRead: UInt64 = 0
  public var stallMs: Double = 0

  public var tokensPerSecond: Double { seconds > 0 ? Double(tokens) / seconds : 0 }
  /// Hits per access; nil without accesses.
  public var hitRate: Double? { hits + misses > 0 ? Double(hits) / Double(hits + misses) : nil }
  public var bytesPerToken: Double? { tokens > 0 ? Double(bytesRead) / Double(tokens) : nil }

  public init() {}

  init(_ c: cfmoe_phase_metrics) {
    tokens = c.tokens
    seconds = c.seconds
    hits = c.hits
    misses = c.misses
    prefetched = c.prefetched
    bytesRead = c.bytes_read
    stallMs = c.stall_ms
  }
}

public struct Metrics: Equatable, Sendable {
  public var prefill = PhaseMetrics()
  public var decode = PhaseMetrics()
  public var first32Hits: UInt64 = 0
  public var first32Accesses: UInt64 = 0

  public init() {}

  init(_ c: cfmoe_metrics) {
    prefill = PhaseMetrics(c.prefill)
    decode = PhaseMetrics(c.decode)
    first32Hits = c.first_32_hits
    first32Accesses = c.first_32_accesses
  }
}

public struct ModelInfo: Equatable, Sendable {
  public var vocabSize: Int
  /// The engine's, in tokens.
  public var contextSize: Int
  public var numLayers: Int
  public var moeLayers: Int
  public var numExperts: Int
  public var topK: Int
  public var prefillChunk: Int
  public var expertRecordBytes: UInt64

  init(_ c: cfmoe_model_info) {
    vocabSize = Int(c.vocab_size)
    contextSize = Int(c.context_size)
    numLayers = Int(c.num_layers)
    moeLayers = Int(c.moe_layers)
    numExperts = Int(c.num_experts)
    topK = Int(c.top_k)
    prefillChunk = Int(c.prefill_chunk)
    expertRecordBytes = c.expert_record_bytes
  }
}

/// Which experts are in memory: one row per MoE layer.
public struct Residents: Equatable, Sendable {
  public let layers: Int
  public let experts: Int
  private let flags: [UInt8]

  init(layers: Int, experts: Int, flags: [UInt8]) {
    precondition(flags.count == layers * experts)
    self.layers = layers
    self.experts = experts
    self.flags = flags
  }

  public subscript(layer: Int, expert: Int) -> Bool { flags[layer * experts + expert] != 0 }
  public var count: Int { flags.reduce(0) { $0 + ($1 != 0 ? 1 : 0) } }
  public func count(inLayer layer: Int) -> Int { (0..<experts).reduce(0) { $0 + (self[layer, $1] ? 1 : 0) } }
}

/// How the next token is chosen.
public struct Sampling: Equatable, Sendable {
  /// 0 is greedy.
  public var temperature: Float = 0
  /// 0 is off.
  public var topK: Int32 = 0
  /// 1 is off.
  public var topP: Float = 1
  /// 1 is off.
  public var repetitionPenalty: Float = 1
  public var seed: UInt64 = 0

  public static let greedy = Sampling()

  public init(temperature: Float = 0, topK: Int32 = 0, topP: Float = 1, repetitionPenalty: Float = 1, seed: UInt64 = 0) {
    self.temperature = temperature
    self.topK = topK
    self.topP = topP
    self.repetitionPenalty = repetitionPenalty
    self.seed = seed
  }

  var c: cfmoe_sampling {
    var out = cfmoe_sampling()
    cfmoe_sampling_init(&out)
    out.temperature = temperature
    out.top_k = topK
    out.top_p = topP
    out.repetition_penalty = repetitionPenalty
    out.seed = seed
    return out
  }
}

public enum FinishReason: String, Equatable, Sendable {
  /// The model ended its answer.
  case stop
  /// As many tokens as were asked for.
  case length
  /// The context has no room left.
  case context
  case cancelled
}

/// One new token; `text` is the whole characters that it completes, nil where there is no tokenizer.
public struct Token: Equatable, Sendable {
  public var id: Int32
  public var text: String?
}

/// The end of an answer.
public struct Generation: Equatable, Sendable {
  public var reason: FinishReason
  public var promptTokens: Int
  public var newTokens: Int
  /// What an unfinished character left, nil where there is no tokenizer.
  public var rest: String?
  /// Tokens of the conversation so far.
  public var position: Int
  public var metrics: Metrics
  public var memory: Memory
}

public enum GenerationEvent: Equatable, Sendable {
  case token(Token)
  /// Exactly one, the last.
  case done(Generation)
}

// The names of `cfmoe run --json`.

extension PhaseMetrics: Encodable {
  enum CodingKeys: String, CodingKey {
    case tokens, seconds
    case tokensPerSecond = "tokens_per_s"
    case hits, misses, chr, prefetched
    case bytesRead = "bytes_read"
    case stallMs = "stall_ms"
  }

  public func encode(to encoder: any Encoder) throws {
    var out = encoder.container(keyedBy: CodingKeys.self)
    try out.encode(tokens, forKey: .tokens)
    try out.encode(seconds, forKey: .seconds)
    try out.encode(tokensPerSecond, forKey: .tokensPerSecond)
    try out.encode(hits, forKey: .hits)
    try out.encode(misses, forKey: .misses)
    try out.encode(hitRate ?? 0, forKey: .chr)
    try out.encode(prefetched, forKey: .prefetched)
    try out.encode(bytesRead, forKey: .bytesRead)
    try out.encode(stallMs, forKey: .stallMs)
  }
}

extension Metrics: Encodable {
  enum CodingKeys: String, CodingKey {
    case prefill, decode
    case first32Hits = "first_32_hits"
    case first32Accesses = "first_32_accesses"
  }
}

extension Memory: Encodable {
  enum CodingKeys: String, CodingKey {
    case budgetBytes = "budget_bytes"
    case smallestBudgetBytes = "smallest_budget_bytes"
    case largestBudgetBytes = "largest_budget_bytes"
    case weightsBytes = "weights_bytes"
    case kvBytes = "kv_bytes"
    case workspaceBytes = "workspace_bytes"
    case poolBytes = "pool_bytes"
    case arenaBytes = "arena_bytes"
    case mappedBytes = "mapped_bytes"
    case expertSlots = "expert_slots"
    case expertTotal = "expert_total"
  }
}
