// What the tests share: the artifact that $CFMOE_ARTIFACT names, scratch directories, reading a stream to its end.
import Foundation
import XCTest

@testable import CFMoEKit

/// The demo model's artifact. A test without it fails: the machinery that runs the tests has to give one.
func demoArtifact() throws -> URL { try artifact("CFMOE_ARTIFACT") }

/// The same with kernels for Metal beside those for this CPU.
func metalArtifact() throws -> URL { try artifact("CFMOE_METAL_ARTIFACT") }

private func artifact(_ variable: String) throws -> URL {
  let path = try XCTUnwrap(ProcessInfo.processInfo.environment[variable], "set \(variable) to an artifact directory")
  return URL(fileURLWithPath: path, isDirectory: true)
}

let prompt = "The proposal adds a new statement to the language. It"

struct Answer {
  var ids: [Int32] = []
  var text = ""
  var done: Generation?
}

func collect(_ stream: AsyncThrowingStream<GenerationEvent, any Error>, onToken: (Int) async throws -> Void = { _ in }) async throws
  -> Answer
{
  var answer = Answer()
  for try await event in stream {
    switch event {
    case .token(let token):
      answer.ids.append(token.id)
      answer.text += token.text ?? ""
      try await onToken(answer.ids.count)
    case .done(let generation):
      XCTAssertNil(answer.done, "a second end")
      answer.text += generation.rest ?? ""
      answer.done = generation
    }
  }
  return answer
}

/// The one line of the user error that `body` throws.
func userError(_ body: () async throws -> Void, file: StaticString = #filePath, line: UInt = #line) async -> String {
  do {
    try await body()
    XCTFail("nothing was thrown", file: file, line: line)
  } catch CFMoEError.user(let message) {
    XCTAssertFalse(message.contains("\n"), file: file, line: line)
    return message
  } catch {
    XCTFail("\(error) is no user error", file: file, line: line)
  }
  return ""
}

/// An empty directory that goes with the test.
func scratch(_ test: XCTestCase) throws -> URL {
  let directory = FileManager.default.temporaryDirectory.appendingPathComponent("cfmoe-\(UUID().uuidString)", isDirectory: true)
  try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
  test.addTeardownBlock { try? FileManager.default.removeItem(at: directory) }
  return directory
}
