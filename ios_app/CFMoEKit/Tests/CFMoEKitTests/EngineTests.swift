// The wrapper against the real engine and the demo model.
import XCTest

@testable import CFMoEKit

final class EngineTests: XCTestCase {
  private func engine(_ budget: MemoryBudget = .automatic) async throws -> Engine {
    try await Engine.open(artifact: demoArtifact(), options: EngineOptions(budget: budget))
  }

  func testModelAndMemory() async throws {
    let engine = try await engine(.expertPercent(50))
    XCTAssertEqual(engine.model.moeLayers, 6)
    XCTAssertEqual(engine.model.numExperts, 32)
    let memory = try engine.memory()
    XCTAssertEqual(memory.expertTotal, 192)
    XCTAssertEqual(memory.expertSlots, 96)
    XCTAssertEqual(
      memory.budgetBytes, memory.weightsBytes + memory.kvBytes + memory.workspaceBytes + memory.poolBytes + memory.arenaBytes)
    XCTAssertFalse(try engine.policy().isEmpty)
    XCTAssert(["direct", "buffered", "mmap"].contains(try engine.io()))
    await engine.close()
  }

  func testBudgetDoesNotChangeTheText() async throws {
    var answers: [[Int32]] = []
    var misses: [UInt64] = []
    for budget in [MemoryBudget.automatic, .expertPercent(20)] {
      let engine = try await engine(budget)
      let tokenizer = try Tokenizer(artifact: demoArtifact())
      let session = try await engine.makeSession()
      let answer = try await collect(session.generate(tokenizer.encode(prompt), maxNewTokens: 48, stopTokens: [], tokenizer: tokenizer))
      answers.append(answer.ids)
      XCTAssertEqual(answer.done?.reason, .length)
      XCTAssertEqual(answer.done?.newTokens, 48)
      XCTAssertEqual(try tokenizer.encode(answer.text).isEmpty, false)
      let metrics = try XCTUnwrap(answer.done?.metrics)
      XCTAssertEqual(metrics.decode.tokens, 47)  // the first comes from the prefill
      XCTAssertGreaterThan(metrics.decode.tokensPerSecond, 0)
      misses.append(metrics.decode.misses)
      await engine.close()
    }
    XCTAssertGreaterThan(misses[1], misses[0])
    XCTAssertEqual(answers[0], answers[1])
    XCTAssertEqual(answers[0].count, 48)
  }

  func testTokensAreThoseOfTheCommandLine() async throws {
    let path = try XCTUnwrap(
      ProcessInfo.processInfo.environment["CFMOE_EXPECTED_TOKENS"], "set CFMOE_EXPECTED_TOKENS to a file of token ids")
    let expected = try JSONDecoder().decode([Int32].self, from: Data(contentsOf: URL(fileURLWithPath: path)))
    let engine = try await engine()
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let answer = try await collect(session.generate(ids, maxNewTokens: expected.count))
    XCTAssertEqual(answer.ids, expected)
    await engine.close()
  }

  func testConversationContinuesUntilReset() async throws {
    let engine = try await engine()
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let first = try await collect(session.generate(ids, maxNewTokens: 8, stopTokens: []))
    let position = try await session.position()
    XCTAssertGreaterThanOrEqual(position, ids.count + 7)
    _ = try await collect(session.generate(ids, maxNewTokens: 8, stopTokens: []))
    let later = try await session.position()
    XCTAssertGreaterThan(later, position)
    try await session.reset()
    let none = try await session.position()
    XCTAssertEqual(none, 0)
    let again = try await collect(session.generate(ids, maxNewTokens: 8, stopTokens: []))
    XCTAssertEqual(again.ids, first.ids)
    await engine.close()
  }

  func testBudgetChangesWhileTokensCome() async throws {
    let engine = try await engine()
    let tokenizer = try Tokenizer(artifact: demoArtifact())
    let session = try await engine.makeSession()
    let ids = try tokenizer.encode(prompt)
    let undisturbed = try await collect(session.generate(ids, maxNewTokens: 400, stopTokens: []))
    try await session.reset()
    var slots: Set<Int> = []
    let answer = try await collect(session.generate(ids, maxNewTokens: 400, stopTokens: [])) { count in
      if count == 10 { slots.insert(try await engine.setBudget(.expertPercent(25)).expertSlots) }
      if count == 100 { slots.insert(try await engine.setBudget(.expertPercent(75)).expertSlots) }
      if count == 150 {
        try engine.trim()
        let residents = try await engine.residents()
        XCTAssertEqual(residents.layers, 6)
        let slots = try engine.memory().expertSlots
        XCTAssertLessThanOrEqual(residents.count, slots)
        let metrics = try await session.metrics()
        XCTAssertGreaterThan(metrics.decode.tokens, 0)
      }
    }
    XCTAssertEqual(slots, [48, 144])
    XCTAssertEqual(answer.ids, undisturbed.ids)
    let memory = try engine.memory()
    XCTAssertEqual(memory.budgetBytes, memory.smallestBudgetBytes)
    await engine.close()
  }

  func testCancelFromAnotherTask() async throws {
    let engine = try await engine()
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let answer = try await collect(session.generate(ids, maxNewTokens: 1500, stopTokens: [])) { count in
      if count == 5 { session.cancel() }
    }
    XCTAssertEqual(answer.done?.reason, .cancelled)
    XCTAssertLessThan(answer.ids.count, 1500)
    // A cancellation before the call begins counts as well.
    let stream = session.generate(ids, maxNewTokens: 1500, stopTokens: [])
    session.cancel()
    let early = try await collect(stream)
    XCTAssertEqual(early.done?.reason, .cancelled)
    // And the session goes on.
    try await session.reset()
    let next = try await collect(session.generate(ids, maxNewTokens: 4, stopTokens: []))
    XCTAssertEqual(next.ids.count, 4)
    await engine.close()
  }

  func testWhoStopsReadingCancels() async throws {
    let engine = try await engine()
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let reader = Task {
      var count = 0
      for try await event in session.generate(ids, maxNewTokens: 1900, stopTokens: []) {
        if case .token = event { count += 1 }
        if count == 3 { break }
      }
    }
    try await reader.value
    let began = Date()
    try await session.reset()  // waits for the generation's end
    XCTAssertLessThan(Date().timeIntervalSince(began), 5)
    let position = try await session.position()
    XCTAssertEqual(position, 0)
    await engine.close()
  }

  func testErrorsAreTheEnginesOneLine() async throws {
    let missing = URL(fileURLWithPath: "/nonexistent/model")
    let notThere = await userError { _ = try await Engine.open(artifact: missing) }
    XCTAssert(notThere.contains("/nonexistent/model"), notThere)
    let small = await userError { _ = try await self.engine(.bytes(1000)) }
    XCTAssert(small.contains("smallest that works"), small)
    let engine = try await engine()
    let refused = await userError { try await engine.setBudget(.bytes(1000)) }
    XCTAssert(refused.contains("smallest that works"), refused)
    let session = try await engine.makeSession()
    let second = await userError { _ = try await engine.makeSession() }
    XCTAssertFalse(second.isEmpty)
    let empty = await userError { _ = try await collect(session.generate([], maxNewTokens: 1)) }
    XCTAssertFalse(empty.isEmpty)
    let unknown = await userError { _ = try await collect(session.generate([1 << 30], maxNewTokens: 1)) }
    XCTAssert(unknown.contains("vocabulary"), unknown)
    let negative = await userError { _ = try await collect(session.generate([1], maxNewTokens: -1)) }
    XCTAssert(negative.contains("-1"), negative)
    let policy = await userError { _ = try await Engine.open(artifact: demoArtifact(), options: EngineOptions(policy: "none such")) }
    XCTAssert(policy.contains("none such"), policy)
    await session.close()
    _ = try await engine.makeSession()
    await engine.close()
    let closed = await userError { _ = try engine.memory() }
    XCTAssert(closed.contains("closed"), closed)
    await engine.close()
  }

  func testContextEnds() async throws {
    let engine = try await Engine.open(artifact: demoArtifact(), options: EngineOptions(contextSize: 64))
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let answer = try await collect(session.generate(ids, maxNewTokens: 500, stopTokens: []))
    XCTAssertEqual(answer.done?.reason, .context)
    await engine.close()
  }

  func testClosingEndsARunningGeneration() async throws {
    let engine = try await engine()
    let session = try await engine.makeSession()
    let ids = try Tokenizer(artifact: demoArtifact()).encode(prompt)
    let answer = try await collect(session.generate(ids, maxNewTokens: 1900, stopTokens: [])) { count in
      if count == 3 { await engine.close() }
    }
    XCTAssertEqual(answer.done?.reason, .cancelled)
  }

  func testManyEnginesLeaveNothingBehind() async throws {
    for _ in 0..<5 { _ = try await engine(.expertPercent(25)) }
    let before = residentBytes()
    for _ in 0..<40 {
      let engine = try await engine(.expertPercent(25))
      let session = try await engine.makeSession()
      _ = try await collect(session.generate([1, 2, 3], maxNewTokens: 2, stopTokens: []))
    }
    try await Task.sleep(nanoseconds: 200_000_000)
    // One engine of this model takes about 20 MB.
    XCTAssertLessThan(residentBytes(), before + 60_000_000)
  }

  private func residentBytes() -> Int {
    let text = (try? String(contentsOfFile: "/proc/self/statm", encoding: .utf8)) ?? ""
    return (Int(text.split(separator: " ").dropFirst().first ?? "") ?? 0) * 4096
  }

  func testPlacement() async throws {
    XCTAssertTrue(Device.cpu.isUsable)
    XCTAssertFalse(Device.metal.isUsable, "Metal on Linux?")
    XCTAssertEqual(Placement.choices([.cpu]), [.cpu])
    XCTAssertEqual(Placement.choices([.cpu, .metal]), [.cpu, Placement(.metal), Placement(prefill: .metal, decode: .cpu)])
    let engine = try await engine()
    XCTAssertEqual(try engine.placement(), .cpu)
    XCTAssertEqual(try engine.deviceName(), "")
    await engine.close()
    let refused = await userError {
      _ = try await Engine.open(artifact: demoArtifact(), options: EngineOptions(placement: Placement(.metal)))
    }
    XCTAssert(refused.contains("metal"), refused)
  }

  func testTokenizer() throws {
    let tokenizer = try Tokenizer(artifact: demoArtifact())
    let text = "Größe: 5 €, 日本語 🙂 and\0nul"
    let ids = try tokenizer.encode(text)
    var back = ""
    for id in ids { back += try tokenizer.push(id) }
    back += try tokenizer.finish()
    XCTAssertEqual(back, text)
    XCTAssertEqual(try tokenizer.encode(""), [])
  }
}
