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
}

@MainActor
public final class ChatViewModel: ViewModel<ChatViewModel.State> {
  public struct State: Equatable, Sendable {
    public var messages: [ChatMessage] = []
    public var isAnswering = false
    /// Why nothing can be sent; nil if something can.
    public var obstacle: String? = "Choose a model first."
    /// Of the last answer.
    public var tokensPerSecond: Double?
  }

  private let host: EngineHost
  private var conversation = 0
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
    guard !text.isEmpty, !state.isAnswering, state.obstacle == nil, let parts = host.parts, let tokenizer = parts.tokenizer else {
      return false
    }
    let isFirst = state.messages.isEmpty
    let answer = ChatMessage(id: nextID + 1, role: .model, text: "")
    update { state in
      state.messages += [ChatMessage(id: nextID, role: .user, text: text), answer]
      state.isAnswering = true
    }
    nextID += 2
    let settings = host.settings
    answering = Task { [weak self] in
      do {
        let tokens = try tokenizer.encode(parts.format.turn(text, isFirst: isFirst))
        let stream = parts.session.generate(
          tokens, maxNewTokens: settings.maxNewTokens, sampling: settings.sampling, tokenizer: tokenizer)
        for try await event in stream { self?.receive(event, answer.id) }
      } catch {
        self?.fail(answer.id, CFMoEError.line(of: error))
      }
      self?.answerEnded(answer.id)
    }
    return true
  }

  /// Ends the answer that is coming; what has come stays.
  public func cancel() { host.parts?.session.cancel() }

  /// Forgets the conversation.
  public func newChat() async {
    do {
      try await host.newConversation()
    } catch {
      update { $0.obstacle = CFMoEError.line(of: error) }
    }
  }

  /// Waits until no answer is coming.
  public func settle() async { await answering?.value }

  private func receive(_ event: GenerationEvent, _ id: Int) {
    change(id) { message in
      switch event {
      case .token(let token): message.text += token.text ?? ""
      case .done(let done):
        message.text += done.rest ?? ""
        message.end = done.reason
      }
    }
    if case .done(let done) = event { update { $0.tokensPerSecond = done.metrics.decode.tokensPerSecond } }
  }

  private func fail(_ id: Int, _ line: String) { change(id) { $0.error = line } }

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
        state.messages = []
        state.isAnswering = false
        state.tokensPerSecond = nil
      }
    }
  }
}
