// The conversation: messages, the answer as it comes, send and stop.
import CFMoEKit
import SwiftUI

struct ChatView: View {
  @ObservedObject var chat: Observed<ChatViewModel>
  @ObservedObject var host: Observed<EngineHost>
  @State private var draft = ""

  var body: some View {
    VStack(spacing: 0) {
      ScrollViewReader { scroll in
        ScrollView {
          LazyVStack(alignment: .leading, spacing: 10) {
            ForEach(chat.messages) { MessageView(message: $0).id($0.id) }
          }
          .padding()
        }
        .onChange(of: chat.messages.last?.text) { _ in
          if let last = chat.messages.last { scroll.scrollTo(last.id, anchor: .bottom) }
        }
      }
      if let obstacle = chat.obstacle { Text(obstacle).font(.footnote).foregroundColor(.secondary).padding(.horizontal) }
      Text(speedText(chat.tokensPerSecond)).font(.caption).foregroundColor(.secondary)
      HStack {
        TextField("Begin a text", text: $draft).textFieldStyle(.roundedBorder).onSubmit(send)
        if chat.isAnswering {
          Button("Stop") { chat.model.cancel() }
        } else {
          Button("Send", action: send).disabled(draft.isEmpty || chat.obstacle != nil)
        }
      }
      .padding()
    }
    .toolbar {
      ToolbarItem(placement: .navigationBarTrailing) {
        Button("New") { Task { await chat.model.newChat() } }
          .disabled(chat.messages.isEmpty)
          .accessibilityLabel("Forget this conversation and begin a new one")
      }
    }
  }

  private func send() {
    if chat.model.send(draft) { draft = "" }
  }
}

private struct MessageView: View {
  let message: ChatMessage

  var body: some View {
    VStack(alignment: .leading, spacing: 4) {
      Text(message.text.isEmpty && message.end == nil && message.error == nil ? "…" : message.text)
        .textSelection(.enabled)
        .padding(10)
        .background(message.role == .user ? Color.accentColor.opacity(0.2) : Color.secondary.opacity(0.12))
        .cornerRadius(12)
      if let note { Text(note).font(.caption).foregroundColor(.secondary) }
    }
    .frame(maxWidth: .infinity, alignment: message.role == .user ? .trailing : .leading)
    .accessibilityElement(children: .combine)
  }

  private var note: String? {
    if let error = message.error { return error }
    switch message.end {
    case .cancelled: return "Stopped"
    case .length: return "Cut off at the longest answer"
    case .context: return "The conversation is as long as this model can take: begin a new one"
    case .stop, nil: return nil
    }
  }
}
