// Conversations in the templates' words, turn by turn with the real engine, and the settings of answers.
import XCTest

@testable import CFMoEKit

private func environment(_ name: String) throws -> URL {
  URL(fileURLWithPath: try XCTUnwrap(ProcessInfo.processInfo.environment[name], "set \(name): tests/python/chat_artifact.py writes it"))
}

final class ChatFormatTests: XCTestCase {
  private struct Row {
    let format: ChatFormat
    let chats: [[String: Any]]
  }

  private func rows() throws -> [Row] {
    let json = try JSONSerialization.jsonObject(with: Data(contentsOf: environment("CFMOE_CONVERSATIONS")))
    return try XCTUnwrap(json as? [[String: Any]]).map { row in
      let chat = try JSONSerialization.data(withJSONObject: try XCTUnwrap(row["chat"]))
      let format = try ChatFormat(Fields(chat, source: "test"), vocabSize: 100)
      return Row(format: format, chats: try XCTUnwrap(row["chats"] as? [[String: Any]]))
    }
  }

  func testWordsOfTheTemplates() throws {
    var compared = 0
    for row in try rows() {
      for chat in row.chats {
        let said = try XCTUnwrap(chat["messages"] as? [String])
        let turns = stride(from: 0, to: said.count, by: 2).map { Turn(user: said[$0], answer: $0 + 1 < said.count ? said[$0 + 1] : nil) }
        let day = try XCTUnwrap(chat["day"] as? String).split(separator: "-").compactMap { Int($0) }
        let pieces = row.format.prompt(turns, system: chat["system"] as? String, today: Day(year: day[0], month: day[1], day: day[2]))
        let text = pieces.map(\.text).joined()
        XCTAssertEqual(Array(text.utf8), Array(try XCTUnwrap(chat["text"] as? String).utf8), text)
        compared += 1
      }
    }
    XCTAssertGreaterThan(compared, 500)
  }

  private let chat: [String: Any] = [
    "begin": "<b>", "reply": "<r>", "replied": "<p>", "next": "<n>", "trim_user": true, "trim_answer": false,
    "system": ["before": "<s>", "after": "</s><b>", "empty": "<e>", "default": "d", "trim": false], "thinking_end": "",
    "thinking_trim": "none", "date_format": "", "stop_token_ids": [1], "stop_strings": ["<n>"],
  ]

  private func parsed(_ change: [String: Any] = [:]) throws -> ChatFormat {
    let data = try JSONSerialization.data(withJSONObject: chat.merging(change) { $1 })
    return try ChatFormat(Fields(data, source: "manifest.json"), vocabSize: 10)
  }

  func testWhatWasTypedIsApart() throws {
    let turns = [Turn(user: " <n> ", answer: "<r>"), Turn(user: "x", answer: nil)]
    let pieces = try parsed().prompt(turns, system: "<b>", today: .today())
    XCTAssertEqual(pieces.filter(\.typed).map(\.text), ["<b>", "<n>", "<r>", "x"])
    XCTAssertEqual(pieces.map(\.text).joined(), "<s><b></s><b><n><p><r><n>x<r>")
    XCTAssertEqual(try parsed().prompt([turns[1]], system: "", today: .today()).map(\.text).joined(), "<e>x<r>")
    XCTAssertEqual(ChatFormat.plain.prompt(turns, system: "s", today: .today()).map(\.text).joined(), " <n> <r>x")
  }

  func testThoughtsAreToldFromWhatIsSaid() throws {
    var thinks = try parsed(["thinking_end": "</think>"])
    XCTAssertEqual(thinks.parts("so</think>\n yes").thoughts, "so</think>")
    XCTAssertEqual(thinks.parts("so</think>\n yes").said, "\n yes")
    XCTAssertEqual(thinks.parts("<think>so").said, "")
    XCTAssertEqual(thinks.parts("yes <think>").thoughts, "")
    thinks.reply = "<r><think>\n"
    XCTAssertEqual(thinks.parts("so").thoughts, "so")
    XCTAssertEqual(ChatFormat.plain.parts("<think>so</think>").said, "<think>so</think>")
  }

  func testDamagedFormatsAreRefused() async throws {
    _ = try parsed(["system": NSNull()])
    let wrong: [[String: Any]] = [
      ["begin": String(repeating: "x", count: 16385)], ["begin": 7], ["date_format": "%H"], ["date_format": "%"], ["thinking_trim": "some"],
      ["stop_token_ids": [10]], ["stop_token_ids": ["x"]], ["stop_strings": [""]], ["stop_strings": [String](repeating: "x", count: 65)],
      ["trim_user": "no"], ["system": ["before": ""]],
    ]
    for change in wrong {
      let line = await userError { _ = try parsed(change) }
      XCTAssert(line.contains("manifest.json"), line)
    }
  }

  func testTheEngineIsToldWhatIsNew() {
    var context = EngineContext()
    func prompt(_ texts: String...) -> [Piece] { texts.enumerated().map { Piece($1, typed: $0 % 2 == 1) } }
    XCTAssertEqual(context.tell(prompt("<b>", "one", "<r>")), Telling(pieces: prompt("<b>", "one", "<r>"), position: 0))
    context.answered(" e\u{301}\r", position: 7)
    let more = prompt("<b>", "one", "<r>", " e\u{301}\r", "\n<b>", "three")
    let rest = Telling(pieces: [Piece("\n<b>"), Piece("three", typed: true)], position: 7)
    XCTAssertEqual(context.tell(more), rest)
    // Without an answer, or for another one, it goes back to the answer before; to the beginning if other words are wanted there.
    XCTAssertEqual(context.tell(more), rest)
    context.answered("x", position: 12)
    XCTAssertEqual(context.tell(more), rest)
    context.answered("", position: 9)
    XCTAssertEqual(context.tell(more), rest)
    XCTAssertEqual(context.tell(prompt("<b>", "two")).position, 0)
    context.answered("y", position: 5)
    XCTAssertEqual(context.tell(prompt("<b>", "two", "y", "z")).position, 5)
    context.lost()
    XCTAssertEqual(context.tell(prompt("<b>", "two", "y", "z")).position, 0)
  }

  func testAnswersEndAtAText() {
    var stop = StopText(["\n###", "User:"])
    XCTAssertEqual(stop.push("Héllo\n#"), "Héllo")
    XCTAssertEqual(stop.push("x"), "\n#x")
    XCTAssertEqual(stop.push(" aUs"), " a")
    XCTAssertEqual(stop.push("er"), "")
    XCTAssertFalse(stop.found)
    XCTAssertEqual(stop.push(":more"), "")
    XCTAssertTrue(stop.found)
    XCTAssertEqual(stop.push("more") + stop.flush(), "")
    var other = StopText(["ab"])
    XCTAssertEqual(other.push("xa"), "x")
    XCTAssertEqual(other.flush(), "a")
  }

  func testTurnsWithoutAnAnswerAreNotOfTheConversation() {
    func messages(_ texts: String...) -> [ChatMessage] {
      texts.enumerated().map { ChatMessage(id: $0, role: $0 % 2 == 0 ? .user : .model, text: $1) }
    }
    let last = Turn(user: "c", answer: nil)
    XCTAssertEqual(turns(messages("a", "", "c", ""), .plain), [last])
    XCTAssertEqual(turns(messages("a", " b", "c", "left over"), .plain), [Turn(user: "a", answer: " b"), last])
    // The space that the template puts before an answer in the past is the one that the model has written.
    var spaced = ChatFormat.plain
    (spaced.reply, spaced.replied) = ("A:", "A: ")
    XCTAssertEqual(turns(messages("a", " b", "c", ""), spaced), [Turn(user: "a", answer: "b"), last])
    XCTAssertEqual(turns(messages("a", "b", "c", ""), spaced), [Turn(user: "a", answer: "b"), last])
  }
}

@MainActor
final class ConversationTests: XCTestCase, @unchecked Sendable {
  private func open(_ name: String, settings: URL? = nil) async throws -> (EngineHost, ChatViewModel) {
    let host = EngineHost(settingsFile: settings)
    host.settings.plain.maxNewTokens = 24
    let chat = ChatViewModel(host: host)
    await host.load(try ModelLibrary.model(at: environment(name), isBundled: true))
    return (host, chat)
  }

  private func say(_ text: String, _ chat: ChatViewModel) async throws -> ChatMessage {
    XCTAssertTrue(chat.send(text))
    await chat.settle()
    return try XCTUnwrap(chat.state.messages.last)
  }

  func testTurnByTurn() async throws {
    let (host, chat) = try await open("CFMOE_CHAT_ARTIFACT")
    XCTAssertNil(chat.state.continues)
    let one = try await say(" The proposal adds ", chat)
    XCTAssertFalse(one.text.isEmpty)
    XCTAssertGreaterThan(one.speed ?? 0, 0)
    let tokenizer = try XCTUnwrap(host.parts?.tokenizer)
    let session = try XCTUnwrap(host.parts?.session)
    let first = try tokenizer.encode("Be kind.<|user|>The proposal adds<|assistant|>").count
    var position = try await session.position()
    XCTAssertEqual(position, first + 24)
    // Only the new turn is read; a special token that was typed is text.
    let two = try await say("And then <|assistant|>?", chat)
    let typed = try tokenizer.encode([Piece("<|pad|><|user|>"), Piece("And then <|assistant|>?", typed: true), Piece("<|assistant|>")])
    XCTAssertGreaterThan(typed.count, try tokenizer.encode("<|pad|><|user|>And then <|assistant|>?<|assistant|>").count)
    let before = position
    position = try await session.position()
    XCTAssertEqual(position, before + typed.count + 24)
    // Another answer, and one after the model was opened again, are the same: greedy, and told everything once.
    XCTAssertTrue(chat.answerAgain())
    await chat.settle()
    XCTAssertEqual(chat.state.messages.map(\.text), [" The proposal adds ", one.text, "And then <|assistant|>?", two.text])
    await host.load(try ModelLibrary.model(at: environment("CFMOE_CHAT_ARTIFACT"), isBundled: true))
    XCTAssertTrue(chat.answerAgain())
    await chat.settle()
    XCTAssertEqual(chat.state.messages.last?.text, two.text)
    // Too long a message is said so, and left out of what the model is told.
    let long = try await say(String(repeating: "word ", count: 3000), chat)
    XCTAssertTrue(long.isTooLong)
    XCTAssert(try XCTUnwrap(long.error).contains("new chat"))
    let short = try await say("Short.", chat)
    XCTAssertEqual(short.end, .length)
    await host.unload()
  }

  func testAModelWithoutATemplateContinuesTheText() async throws {
    let (host, chat) = try await open("CFMOE_ARTIFACT")
    XCTAssertEqual(chat.state.continues, "This model has no chat template: it continues the text.")
    _ = try await say("The proposal adds ", chat)
    let position = try await XCTUnwrap(host.parts?.session).position()
    XCTAssertEqual(position, try XCTUnwrap(host.parts?.tokenizer).encode("The proposal adds ").count + 24)
    await host.unload()
  }

  func testSettings() async throws {
    let file = try scratch(self).appendingPathComponent("settings.json")
    let (host, chat) = try await open("CFMOE_CHAT_ARTIFACT", settings: file)
    let settings = SettingsViewModel(host: host)
    XCTAssertEqual(settings.state.model, "demo-chat")
    XCTAssertEqual(settings.state.system, "Be kind.")
    XCTAssertTrue(settings.state.hasSystem)
    let greedy = try await say("The proposal adds", chat).text
    settings.setGreedy(false)
    settings.setText(.temperature, "1,8")
    settings.setText(.topK, "0")
    settings.setText(.seed, "3")
    XCTAssertTrue(chat.answerAgain())
    await chat.settle()
    let drawn = chat.state.messages.last?.text
    XCTAssertNotEqual(drawn, greedy)
    XCTAssertTrue(chat.answerAgain())
    await chat.settle()
    XCTAssertEqual(chat.state.messages.last?.text, drawn)
    // What is no value is said, and changes nothing.
    settings.setText(.topP, "7")
    XCTAssertEqual(settings.state.errors, [.topP: "Give a number from 0.01 to 1"])
    XCTAssertEqual(host.generation.topP, 1)
    settings.setSystem("Be brief.")
    settings.setText(.maxNewTokens, "5")
    XCTAssertEqual(SettingsStore(file: file).read()[try XCTUnwrap(host.loaded).model.id], host.generation)
    let short = try await say("Go on.", chat)
    XCTAssertEqual(short.end, .length)
    let other = EngineHost(settingsFile: file)
    await other.load(try ModelLibrary.model(at: environment("CFMOE_CHAT_ARTIFACT"), isBundled: true))
    XCTAssertEqual(other.generation, host.generation)
    await other.unload()
    settings.reset()
    XCTAssertEqual(settings.state.texts[.temperature], "1")
    XCTAssertEqual(settings.state.errors, [:])
    XCTAssertEqual(host.generation.maxNewTokens, 24)
    XCTAssertEqual(SettingsStore(file: file).read(), [:])
    await host.unload()
    XCTAssertNil(settings.state.model)
  }
}

final class SettingTests: XCTestCase {
  func testBounds() {
    XCTAssertEqual(SettingField.temperature.value(" 0,7 "), 0.7)
    for wrong in ["", "warm", "0", "5.1", "nan", "1e999", "-1"] { XCTAssertNil(SettingField.temperature.value(wrong), wrong) }
    XCTAssertNil(SettingField.topK.value("1.5"))
    for field in SettingField.allCases {
      for edge in [field.range.lowerBound, field.range.upperBound] { XCTAssertEqual(field.value(field.text(edge)), edge) }
      var settings = GenerationSettings()
      settings[field] = field.range.upperBound
      XCTAssertEqual(settings[field], field.range.upperBound)
    }
  }

  func testRecommendations() throws {
    let file = try scratch(self).appendingPathComponent("generation_config.json")
    let plain = GenerationSettings()
    XCTAssertEqual(GenerationSettings.recommended(file, otherwise: plain), plain)
    try Data(#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1}"#.utf8).write(to: file)
    let settings = GenerationSettings.recommended(file, otherwise: plain)
    XCTAssertEqual(settings.sampling().temperature, 0.6)
    XCTAssertEqual([Double(settings.topK), settings.topP, settings.repetitionPenalty], [20, 0.95, 1.1])
    try Data(#"{"do_sample": "yes", "temperature": 99, "top_k": null, "top_p": []}"#.utf8).write(to: file)
    XCTAssertEqual(GenerationSettings.recommended(file, otherwise: plain), plain)
  }

  func testDamagedFilesAreNoSettings() throws {
    let file = try scratch(self).appendingPathComponent("settings.json")
    var settings = GenerationSettings()
    settings.seed = 17
    settings.system = "Be \"brief\".\n"
    try SettingsStore(file: file).write(["m": settings])
    XCTAssertEqual(SettingsStore(file: file).read(), ["m": settings])
    settings.temperature = 70
    try SettingsStore(file: file).write(["m": settings])
    XCTAssertEqual(SettingsStore(file: file).read(), [:])
    for damage in ["", "{", "[]", #"{"m": {}}"#] {
      try Data(damage.utf8).write(to: file)
      XCTAssertEqual(SettingsStore(file: file).read(), [:])
    }
  }
}
