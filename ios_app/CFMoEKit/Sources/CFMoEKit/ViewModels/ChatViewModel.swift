// The chat screen: messages, the answer as it comes, cancel.
import Foundation

public struct ChatMessage: Equatable, Identifiable, Sendable {
  public enum Role: Equatable, Sendable { case user, model }

  public let id: Int
  public let role: Role
  public var text: String
  /// Of an answer: why it ended; nil while it comes.
  public var end: FinishReason?
  /// Of an answer that failed: the one line that says why.
  public var error: String?
  /// Of an answer that has ended, in tokens/s; nil where it is too short.
  public var speed: Double?
  /// The conversation has become too long: only a new one helps, or a shorter message.
  public var isTooLong = false
}

@MainActor
public final class ChatViewModel: ViewModel<ChatViewModel.State> {
  public struct State: Equatable, Sendable {
    public var messages: [ChatMessage] = []
    public var isAnswering = false
    /// Why nothing can be sent; nil if something can.
    public var obstacle: String? = "Choose a model first."
    /// How the model's conversations are written.
    public var format = ChatFormat.plain
    /// Where the model has no chat template that is used: that it continues text, and why.
    public var continues: String?
    /// Of the last answer.
    public var tokensPerSecond: Double?
  }

  private let host: EngineHost
  private var conversation = 0
  private var model: String?
  private var context = EngineContext()
  private var isForgetting = false
  private var answering: Task<Void, Never>?
  private var nextID = 0

  public init(host: EngineHost) {
    self.host = host
    super.init(State())
    host.observe { [weak self] in self?.hostChanged() }
    hostChanged()
  }

  /// Sends `text`; the answer comes into the state. Returns whether it could be sent.
  @discardableResult
  public func send(_ text: String) -> Bool {
    guard !text.isEmpty, canAsk else { return false }
    ask { state in state.messages.append(ChatMessage(id: nextID, role: .user, text: text)) }
    return true
  }

  /// Another answer to the last message, in place of the one that is there.
  @discardableResult
  public func answerAgain() -> Bool {
    guard canAsk, state.messages.last?.role == .model else { return false }
    ask { state in state.messages.removeLast() }
    return true
  }

  private var canAsk: Bool { !state.isAnswering && !isForgetting && state.obstacle == nil && host.parts?.tokenizer != nil }

  private func ask(_ change: (inout State) -> Void) {
    guard let parts = host.parts, let tokenizer = parts.tokenizer else { return }
    let id = nextID + 1
    nextID += 2
    update { state in
      change(&state)
      state.messages.append(ChatMessage(id: id, role: .model, text: ""))
      state.isAnswering = true
    }
    let settings = host.generation
    let telling = context.tell(parts.format.prompt(turns(state.messages, parts.format), system: settings.system, today: .today()))
    var stop = StopText(parts.format.stopStrings)
    answering = Task { [weak self] in
      do {
        let tokens = try tokenizer.encode(telling.pieces)
        try await parts.session.rewind(to: telling.position)
        let before = try await parts.session.metrics().decode
        let stream = parts.session.generate(
          tokens, maxNewTokens: settings.maxNewTokens, sampling: settings.sampling(), stopTokens: parts.format.stopTokenIDs,
          tokenizer: tokenizer)
        for try await event in stream {
          switch event {
          case .token(let token):
            self?.change(id) { $0.text += stop.push(token.text ?? "") }
            if stop.found { parts.session.cancel() }
          case .done(let done): self?.receive(done, stop.flush(), stop.found, before, id)
          }
        }
      } catch {
        self?.fail(id, CFMoEError.line(of: error))
      }
      self?.answerEnded(id)
    }
  }

  /// Ends the answer that is coming; what has come stays.
  public func cancel() { host.parts?.session.cancel() }

  /// Forgets the conversation.
  public func newChat() async {
    isForgetting = true
    do {
      try await host.newConversation()
    } catch {
      update { $0.obstacle = CFMoEError.line(of: error) }
    }
    isForgetting = false
  }

  /// Waits until no answer is coming.
  public func settle() async { await answering?.value }

  private func receive(_ done: Generation, _ held: String, _ stopped: Bool, _ before: PhaseMetrics, _ id: Int) {
    guard state.messages.last?.id == id else { return }
    let tokens = done.metrics.decode.tokens - before.tokens
    let seconds = done.metrics.decode.seconds - before.seconds
    let speed = tokens > 0 && seconds > 0 ? Double(tokens) / seconds : nil
    change(id) { message in
      message.text += held + (stopped ? "" : done.rest ?? "")
      message.end = stopped ? .stop : done.reason
      message.isTooLong = done.reason == .context
      message.speed = speed
    }
    update { $0.tokensPerSecond = speed }
    // What ended the answer is in the engine and not in the conversation.
    if !stopped, let text = state.messages.last?.text { context.answered(text, position: done.position) }
  }

  private func fail(_ id: Int, _ line: String) {
    change(id) { message in
      message.isTooLong = line.contains("more than the context of")
      message.error =
        message.isTooLong ? "This message is too long for what is left of the conversation: shorten it, or begin a new chat." : line
    }
  }

  private func answerEnded(_ id: Int) {
    // A new conversation may have begun meanwhile, with an answer of its own.
    guard state.messages.last?.id == id else { return }
    change(id) { if $0.end == nil && $0.error == nil { $0.end = .cancelled } }
    update { $0.isAnswering = false }
  }

  private func change(_ id: Int, _ body: (inout ChatMessage) -> Void) {
    update { state in
      guard let index = state.messages.lastIndex(where: { $0.id == id }) else { return }
      body(&state.messages[index])
    }
  }

  private func hostChanged() {
    update { state in
      switch host.state {
      case .empty: state.obstacle = "Choose a model first."
      case .loading(let model): state.obstacle = "\(model) is being opened."
      case .failed(let line): state.obstacle = line
      case .ready(let loaded):
        state.obstacle = loaded.textError
        guard loaded.conversation != conversation else { return }
        conversation = loaded.conversation
        context.lost()
        let manifest = loaded.model.manifest
        state.format = manifest.chat ?? .plain
        state.continues = manifest.chat == nil ? Self.continuesText(manifest.chatAbsent) : nil
        state.isAnswering = false
        // The same model again, on another device or after a benchmark, is told the conversation with the next message.
        if isForgetting || model != loaded.model.id {
          state.messages = []
          state.tokensPerSecond = nil
        }
        model = loaded.model.id
      }
    }
  }

  private static func continuesText(_ absent: String) -> String {
    absent.isEmpty
      ? "This model has no chat template: it continues the text." : "The chat template is not used, the text is continued: \(absent)."
  }
}

/// The conversation that the model shall know: what got no answer is not of it, but for the last.
func turns(_ messages: [ChatMessage], _ format: ChatFormat) -> [Turn] {
  let pairs = stride(from: 0, to: messages.count - 1, by: 2).map {
    Turn(user: messages[$0].text, answer: format.said(messages[$0 + 1].text))
  }
  guard let last = pairs.last else { return [] }
  return pairs.dropLast().filter { $0.answer?.isEmpty == false } + [Turn(user: last.user, answer: nil)]
}
