// The conversation: messages, the answer as it comes, send and stop.
import CFMoEKit
import SwiftUI
import UIKit

struct ChatView: View {
  @ObservedObject var chat: Observed<ChatViewModel>
  @ObservedObject var settings: Observed<SettingsViewModel>
  @State private var draft = ""
  @State private var showsSettings = false
  /// An answer that grows is followed until a finger moves the list.
  @State private var follows = true

  var body: some View {
    VStack(spacing: 0) {
      if let continues = chat.continues { Text(continues).font(.footnote).foregroundColor(.secondary).padding(.horizontal) }
      ScrollViewReader { scroll in
        ScrollView {
          LazyVStack(alignment: .leading, spacing: 10) {
            ForEach(chat.messages) { message in
              MessageView(message: message, isLast: message.id == chat.messages.last?.id, chat: chat) { follows = true }
                .id(message.id)
            }
          }
          .padding()
        }
        .simultaneousGesture(DragGesture().onChanged { _ in follows = false })
        .onChange(of: chat.messages.last?.text) { _ in if follows { showEnd(scroll) } }
        .onChange(of: follows) { now in if now { showEnd(scroll) } }
      }
      if chat.isAnswering && !follows {
        Button("To the end") { follows = true }.font(.footnote).accessibilityLabel("Scroll to the end of the answer")
      }
      if let obstacle = chat.obstacle { Text(obstacle).font(.footnote).foregroundColor(.secondary).padding(.horizontal) }
      HStack {
        TextField(chat.continues == nil ? "Message" : "Begin a text", text: $draft).textFieldStyle(.roundedBorder).onSubmit(send)
        if chat.isAnswering {
          Button("Stop") { chat.model.cancel() }
        } else {
          Button("Send", action: send).disabled(draft.isEmpty || chat.obstacle != nil)
        }
      }
      .padding()
    }
    .toolbar {
      ToolbarItemGroup(placement: .navigationBarTrailing) {
        Button("Settings") { showsSettings = true }
          .disabled(settings.state.model == nil)
          .accessibilityLabel("Settings of the answers")
        Button("New") { Task { await chat.model.newChat() } }
          .disabled(chat.messages.isEmpty)
          .accessibilityLabel("Forget this conversation and begin a new one")
      }
    }
    .sheet(isPresented: $showsSettings) { SettingsView(settings: settings) { showsSettings = false } }
  }

  private func send() {
    guard chat.model.send(draft) else { return }
    draft = ""
    follows = true
  }

  private func showEnd(_ scroll: ScrollViewProxy) {
    if let last = chat.messages.last { scroll.scrollTo(last.id, anchor: .bottom) }
  }
}

private struct MessageView: View {
  let message: ChatMessage
  let isLast: Bool
  @ObservedObject var chat: Observed<ChatViewModel>
  let asked: @MainActor () -> Void

  var body: some View {
    VStack(alignment: .leading, spacing: 4) {
      content
        .textSelection(.enabled)
        .padding(10)
        .background(message.role == .user ? Color.accentColor.opacity(0.2) : Color.secondary.opacity(0.12))
        .cornerRadius(12)
      if let note { Text(note).font(.caption).foregroundColor(.secondary) }
      if message.role == .model && !isComing { actions }
    }
    .frame(maxWidth: .infinity, alignment: message.role == .user ? .trailing : .leading)
    .accessibilityElement(children: .contain)
  }

  private var content: some View {
    VStack(alignment: .leading, spacing: 6) {
      if !parts.thoughts.isEmpty { Text(parts.thoughts).font(.footnote).foregroundColor(.secondary) }
      if isComing && message.text.isEmpty {
        Text("…")
      } else if !said.isEmpty {
        Text(said)
      }
    }
  }

  private var parts: (thoughts: String, said: String) { message.role == .model ? chat.format.parts(message.text) : ("", message.text) }

  private var said: String { parts.thoughts.isEmpty ? parts.said : parts.said.trimmingCharacters(in: .whitespacesAndNewlines) }

  private var actions: some View {
    HStack(spacing: 20) {
      if !message.text.isEmpty {
        Button("Copy") { UIPasteboard.general.string = said.isEmpty ? message.text : said }.accessibilityLabel("Copy this answer")
      }
      if isLast && message.isTooLong {
        Button("New chat") { Task { await chat.model.newChat() } }.accessibilityLabel("Forget this conversation and begin a new one")
      } else if isLast {
        Button("Again") { if chat.model.answerAgain() { asked() } }
          .disabled(chat.isAnswering || chat.obstacle != nil)
          .accessibilityLabel("Make another answer in place of this one")
      }
    }
    .font(.footnote)
    .buttonStyle(.borderless)
  }

  private var isComing: Bool { isLast && chat.isAnswering }

  /// Why the answer ended, and how fast it came.
  private var note: String? {
    let parts = [ending, message.speed.map { speedText($0) }].compactMap { $0 }
    return parts.isEmpty ? nil : parts.joined(separator: " · ")
  }

  private var ending: String? {
    if let error = message.error { return error }
    switch message.end {
    case .cancelled: return "Stopped"
    case .length: return "Cut off at the longest answer"
    case .context: return "The conversation is as long as this model can take: begin a new one"
    case .stop, nil: return nil
    }
  }
}
