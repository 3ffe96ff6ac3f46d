// The screens' view models over the real engine and the demo model.
import XCTest

@testable import CFMoEKit

@MainActor
final class ViewModelTests: XCTestCase, @unchecked Sendable {
  private func host(available: UInt64? = nil) -> EngineHost {
    let host = EngineHost { available }
    host.settings.plain.maxNewTokens = 24
    return host
  }

  private func demo() throws -> InstalledModel { try ModelLibrary.model(at: demoArtifact(), isBundled: true) }

  /// Waits until `condition` holds.
  private func wait(_ condition: () -> Bool, file: StaticString = #filePath, line: UInt = #line) async throws {
    for _ in 0..<2000 {
      if condition() { return }
      try await Task.sleep(nanoseconds: 5_000_000)
    }
    XCTFail("it did not happen", file: file, line: line)
  }

  func testChat() async throws {
    let host = host()
    let chat = ChatViewModel(host: host)
    XCTAssertNotNil(chat.state.obstacle)
    XCTAssertFalse(chat.send("too early"))
    await host.load(try demo())
    XCTAssertNil(chat.state.obstacle)
    var texts: [String] = []
    chat.onChange = { [unowned chat] in
      if let text = chat.state.messages.last?.text, texts.last != text { texts.append(text) }
    }
    XCTAssertTrue(chat.send(prompt))
    XCTAssertTrue(chat.state.isAnswering)
    XCTAssertFalse(chat.send("while it answers"))
    await chat.settle()
    XCTAssertFalse(chat.state.isAnswering)
    XCTAssertEqual(chat.state.messages.map(\.role), [.user, .model])
    let answer = chat.state.messages[1]
    XCTAssertEqual(answer.end, .length)
    XCTAssertGreaterThan(texts.count, 10, "it was not streamed")
    XCTAssertGreaterThan(chat.state.tokensPerSecond ?? 0, 0)
    // It goes on, and a new chat begins at the beginning.
    XCTAssertTrue(chat.send(prompt))
    await chat.settle()
    XCTAssertEqual(chat.state.messages.count, 4)
    await chat.newChat()
    XCTAssertEqual(chat.state.messages, [])
    chat.send(prompt)
    await chat.settle()
    XCTAssertEqual(chat.state.messages[1].text, answer.text)
    await host.unload()
    XCTAssertNotNil(chat.state.obstacle)
  }

  func testChatCancel() async throws {
    let host = host()
    host.settings.plain.maxNewTokens = 1900
    let chat = ChatViewModel(host: host)
    await host.load(try demo())
    chat.send(prompt)
    try await wait { (chat.state.messages.last?.text.count ?? 0) > 20 }
    chat.cancel()
    await chat.settle()
    XCTAssertEqual(chat.state.messages.last?.end, .cancelled)
    XCTAssertNil(chat.state.messages.last?.error)
    // A new chat in mid-answer ends it as well.
    chat.send(prompt)
    try await wait { (chat.state.messages.last?.text.count ?? 0) > 20 }
    await chat.newChat()
    XCTAssertEqual(chat.state.messages, [])
    XCTAssertFalse(chat.state.isAnswering)
    // The same model opened again ends the answer, and keeps what was said; another model has its own conversation.
    chat.send(prompt)
    try await wait { (chat.state.messages.last?.text.count ?? 0) > 20 }
    await host.load(try demo())
    await chat.settle()
    XCTAssertEqual(chat.state.messages.map(\.end), [nil, .cancelled])
    let other = try scratch(self).appendingPathComponent("other", isDirectory: true)
    try FileManager.default.copyItem(at: demoArtifact(), to: other)
    await host.load(try ModelLibrary.model(at: other, isBundled: false))
    XCTAssertEqual(chat.state.messages, [])
    await host.unload()
  }

  func testChatErrorIsShownInTheAnswer() async throws {
    let host = host()
    let chat = ChatViewModel(host: host)
    await host.load(try demo())
    chat.send(String(repeating: "word ", count: 5000))
    await chat.settle()
    let line = try XCTUnwrap(chat.state.messages.last?.error)
    XCTAssert(line.contains("begin a new chat"), line)
    XCTAssertFalse(chat.state.isAnswering)
    await host.unload()
  }

  func testPanelWhileItAnswers() async throws {
    let host = host()
    host.settings.plain.maxNewTokens = 1500
    let chat = ChatViewModel(host: host)
    let panel = PanelViewModel(host: host)
    XCTAssertNil(panel.state.budgetRange)
    await host.load(try demo())
    await panel.refresh()
    let range = try XCTUnwrap(panel.state.budgetRange)
    XCTAssertEqual(panel.state.budgetBytes, range.upperBound)
    chat.send(prompt)
    panel.start(every: 0.02)
    try await wait { panel.state.tokensPerSecond != nil }
    XCTAssertTrue(chat.state.isAnswering)
    XCTAssertNotNil(panel.state.metrics.prefill.hitRate)
    XCTAssertNotNil(panel.state.metrics.decode.bytesPerToken)
    let full = try XCTUnwrap(panel.state.residents).count
    // Three wishes in a row: the last is done.
    panel.setBudget(range.upperBound - 1)
    panel.setBudget(0)
    let middle = (range.lowerBound + range.upperBound) / 2
    panel.setBudget(middle)
    XCTAssertEqual(panel.state.budgetBytes, middle)
    XCTAssertTrue(panel.state.isChangingBudget)
    await panel.settle()
    XCTAssertTrue(chat.state.isAnswering, "the budget waited for the end of the answer")
    XCTAssertFalse(panel.state.isChangingBudget)
    XCTAssertLessThanOrEqual(try XCTUnwrap(panel.state.memory).budgetBytes, middle)
    XCTAssertEqual(host.settings.budgetBytes, middle)
    try await wait { (panel.state.residents?.count ?? full) < full }
    panel.lowMemory()
    try await wait { panel.state.memory.map { $0.budgetBytes == $0.smallestBudgetBytes } ?? false }
    XCTAssertNil(panel.state.error)
    panel.stop()
    chat.cancel()
    await chat.settle()
    await host.unload()
    XCTAssertNil(panel.state.memory)
  }

  func testAvailableMemoryBoundsTheSlider() async throws {
    let all = host()
    let unbounded = PanelViewModel(host: all)
    await all.load(try demo())
    await unbounded.refresh()
    let memory = try XCTUnwrap(unbounded.state.memory)
    await all.unload()
    // The engine opens within what is available, and the slider goes no further than that allows.
    let available = memory.smallestBudgetBytes + (memory.largestBudgetBytes - memory.smallestBudgetBytes) / 2 + (32 << 20)
    let host = host(available: available)
    let panel = PanelViewModel(host: host)
    await host.load(try demo())
    guard case .ready = host.state else { return XCTFail("\(host.state)") }
    await panel.refresh()
    let state = panel.state
    XCTAssertEqual(state.availableBytes, available)
    XCTAssertLessThanOrEqual(try XCTUnwrap(state.memory).budgetBytes, usable(available))
    XCTAssertLessThan(try XCTUnwrap(state.memory).expertSlots, memory.expertTotal)
    // Nor where the experts have not been read yet, and their memory still counts as free.
    XCTAssertEqual(try XCTUnwrap(state.budgetRange).upperBound, usable(available))
    // A wish of before is bounded as well.
    host.settings.budgetBytes = memory.largestBudgetBytes
    await host.load(try demo())
    XCTAssertLessThanOrEqual(try XCTUnwrap(host.parts).engine.memory().budgetBytes, usable(available))
    await host.unload()
    let none = self.host(available: 1 << 20)
    await none.load(try demo())
    guard case .failed(let line) = none.state else { return XCTFail("\(none.state)") }
    XCTAssert(line.contains("smallest that works"), line)
  }

  func testAGPUThatCannotBeOpenedLeavesTheCPU() async throws {
    // On Linux the engine has no Metal, as on a phone whose Metal refuses the kernels.
    let host = EngineHost(devices: [.cpu, .metal])
    host.settings.plain.maxNewTokens = 8
    let chat = ChatViewModel(host: host)
    let model = try ModelLibrary.model(at: metalArtifact(), isBundled: true)
    await host.load(model)
    XCTAssertEqual(host.loaded?.placements, Placement.choices([.cpu, .metal]))
    XCTAssertEqual(host.loaded?.warning, "")
    for wanted in [Placement(.metal), Placement(prefill: .metal, decode: .cpu)] {
      await host.choose(wanted)
      let loaded = try XCTUnwrap(host.loaded, "\(host.state)")
      XCTAssertEqual(loaded.placement, .cpu)
      XCTAssertEqual(host.settings.placement, .cpu)
      XCTAssert(loaded.warning.hasPrefix("The GPU cannot be used, the CPU computes: "), loaded.warning)
      XCTAssert(loaded.warning.contains("metal"), loaded.warning)
      XCTAssertTrue(chat.send(prompt))
      await chat.settle()
      XCTAssertEqual(chat.state.messages.last?.end, .length)
    }
    await host.load(model)
    XCTAssertEqual(host.loaded?.warning, "")
    await host.unload()
  }

  func testABudgetIsThatOfOneModel() async throws {
    let host = host()
    await host.load(try demo())
    let smallest = try XCTUnwrap(host.parts).engine.memory().smallestBudgetBytes
    host.settings.budgetBytes = smallest
    await host.load(try demo())
    XCTAssertEqual(host.settings.budgetBytes, smallest)
    XCTAssertEqual(try XCTUnwrap(host.parts).engine.memory().budgetBytes, smallest)
    host.settings.budgetBytes = 1
    await host.load(try ModelLibrary.model(at: metalArtifact(), isBundled: true))
    XCTAssertNil(host.settings.budgetBytes)
    XCTAssertGreaterThan(try XCTUnwrap(host.parts).engine.memory().budgetBytes, smallest)
    await host.unload()
  }

  func testModels() async throws {
    let library = try ModelLibrary(root: scratch(self), bundled: [demoArtifact()])
    let host = host()
    let models = ModelsViewModel(library: library, host: host)
    XCTAssertEqual(models.state.models.count, 1)
    var finished = 0
    var fractions: [Double] = []
    models.onChange = { [unowned models] in if let step = models.state.importing { fractions.append(step.fraction) } }
    models.importModel(try demoArtifact()) { finished += 1 }
    models.importModel(try demoArtifact()) { finished += 1 }
    XCTAssertNotNil(models.state.error, "two imports at once")
    models.dismissError()
    await models.settle()
    XCTAssertEqual(finished, 2)
    XCTAssertNil(models.state.error)
    XCTAssertNil(models.state.importing)
    XCTAssertEqual(models.state.models.count, 2)
    XCTAssertEqual(fractions, fractions.sorted())
    let imported = try XCTUnwrap(models.state.models.last)
    await models.open(imported)
    XCTAssertEqual(models.state.openID, imported.id)
    await models.delete(imported)
    XCTAssertNil(models.state.openID)
    XCTAssertEqual(models.state.models.count, 1)
    models.importModel(URL(fileURLWithPath: "/nonexistent")) { finished += 1 }
    await models.settle()
    XCTAssertEqual(finished, 3)
    XCTAssert(models.state.error?.contains("not there any more") ?? false)
    models.importModel(try demoArtifact())
    models.cancelImport()
    await models.settle()
    XCTAssertEqual(models.state.models.count, 1)
  }

  func testBenchmark() async throws {
    let path = try XCTUnwrap(
      ProcessInfo.processInfo.environment["CFMOE_EXPECTED_BENCH"], "set CFMOE_EXPECTED_BENCH to what cfmoe-engine bench wrote")
    let expected = try JSONSerialization.jsonObject(with: Data(contentsOf: URL(fileURLWithPath: path))) as? [String: Any]
    let host = host()
    let benchmark = BenchmarkViewModel(host: host, machine: "test")
    benchmark.run()
    XCTAssertNotNil(benchmark.state.error)
    await host.load(try demo())
    benchmark.run(.init(expertPercents: [100, 25], promptTokens: 64, newTokens: 32))
    XCTAssertTrue(benchmark.state.isRunning)
    await benchmark.settle()
    XCTAssertFalse(benchmark.state.isRunning)
    XCTAssertNil(benchmark.state.error)
    let report = try XCTUnwrap(benchmark.state.report)
    XCTAssertEqual(report.results.map(\.memoryBudget), ["100%", "25%"])
    let json = try XCTUnwrap(JSONSerialization.jsonObject(with: report.json()) as? [String: Any])
    XCTAssertEqual(json["machine"] as? String, "test")
    let ours = try XCTUnwrap(json["results"] as? [[String: Any]])
    let theirs = try XCTUnwrap(expected?["results"] as? [[String: Any]])
    XCTAssertEqual(ours.count, theirs.count)
    for (one, other) in zip(ours, theirs) {
      XCTAssertEqual(one["token_ids"] as? [Int], other["token_ids"] as? [Int])
      // Runs with all that they need in memory are the command's alone: they tell devices apart, not budgets.
      XCTAssertEqual(
        Set(one.keys), Set(other.keys).subtracting(["resident_prefill_tokens_per_s", "resident_decode_tokens_per_s"]))
      let memory = try XCTUnwrap(one["memory"] as? [String: Any])
      let otherMemory = try XCTUnwrap(other["memory"] as? [String: Any])
      // What the process takes as a whole is the command's to say.
      XCTAssertEqual(Set(memory.keys), Set(otherMemory.keys).subtracting(["rss_bytes", "peak_rss_bytes"]))
      let metrics = try XCTUnwrap(one["metrics"] as? [String: Any])
      let otherMetrics = try XCTUnwrap(other["metrics"] as? [String: Any])
      XCTAssertEqual(Set(metrics.keys), Set(otherMetrics.keys))
      let decode = try XCTUnwrap(metrics["decode"] as? [String: Any])
      let otherDecode = try XCTUnwrap(otherMetrics["decode"] as? [String: Any])
      XCTAssertEqual(Set(decode.keys), Set(otherDecode.keys))
      for name in ["hits", "misses", "tokens", "bytes_read"] { XCTAssertEqual(decode[name] as? Int, otherDecode[name] as? Int, name) }
    }
    // The model is open again.
    guard case .ready = host.state else { return XCTFail("\(host.state)") }
    benchmark.run()
    benchmark.cancel()
    await benchmark.settle()
    XCTAssertLessThan(benchmark.state.done, 3)
    await host.unload()
  }

  func testBenchmarkLeavesOutWhatDoesNotFit() async throws {
    let all = host()
    await all.load(try demo())
    let memory = try XCTUnwrap(all.parts).engine.memory()
    await all.unload()
    let host = host(available: memory.smallestBudgetBytes + (memory.largestBudgetBytes - memory.smallestBudgetBytes) / 2 + (32 << 20))
    await host.load(try demo())
    let benchmark = BenchmarkViewModel(host: host, machine: "test")
    benchmark.run(.init(expertPercents: [100, 25], promptTokens: 16, newTokens: 4))
    await benchmark.settle()
    XCTAssertEqual(benchmark.state.report?.results.map(\.memoryBudget), ["25%"])
    XCTAssertEqual(benchmark.state.done, 2)
    XCTAssert(try XCTUnwrap(benchmark.state.error).hasPrefix("100% of the experts take "), benchmark.state.error!)
    await host.unload()
  }

  func testLoadFailuresAndRaces() async throws {
    let host = host()
    let broken = try scratch(self).appendingPathComponent("broken", isDirectory: true)
    try FileManager.default.copyItem(at: demoArtifact(), to: broken)
    let weights = broken.appendingPathComponent("weights.bin")
    var bytes = try Data(contentsOf: weights)
    bytes[1000] ^= 0xff
    try bytes.write(to: weights)
    let model = try ModelLibrary.model(at: broken, isBundled: false)
    await host.load(model)
    guard case .failed(let line) = host.state else { return XCTFail("\(host.state)") }
    XCTAssert(line.contains("weights.bin"), line)
    // Several loads at once: the last wins, and one engine stays.
    let demo = try demo()
    let loads = [demo, model, demo, demo].map { model in Task { await host.load(model) } }
    for load in loads { await load.value }
    XCTAssertEqual(host.loaded?.model.id, demo.id)
    await host.unload()
    XCTAssertEqual(host.state, .empty)
  }
}

final class ValueTests: XCTestCase {
  func testUsableNeverExceedsWhatIsThere() {
    for available in [0, 1, 100, 1 << 20, 32 << 20, 33 << 20, 1 << 30, UInt64.max] {
      XCTAssertLessThanOrEqual(usable(available), available)
    }
    XCTAssertEqual(usable(1 << 30), (1 << 30) - (1 << 30) / 10)
  }
}
