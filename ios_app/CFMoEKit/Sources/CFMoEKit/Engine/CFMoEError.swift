// What can fail, told apart by what the caller can do; each carries the one line that the engine or this package wrote.
import CCFMoE
import Foundation

public enum CFMoEError: Error, Equatable, Sendable {
  /// The caller can mend it; the line says how.
  case user(String)
  /// A fault of the engine or the machine.
  case fault(String)
  /// The call was cancelled, and nothing else is wrong.
  case cancelled

  public var message: String {
    switch self {
    case .user(let line), .fault(let line): return line
    case .cancelled: return "cancelled"
    }
  }

  /// The line to show for any error: ours as it is, the system's in its own words.
  public static func line(of error: any Error) -> String {
    if let known = error as? CFMoEError { return known.message }
    if error is CancellationError { return CFMoEError.cancelled.message }
    return error.localizedDescription
  }
}

extension CFMoEError: LocalizedError {
  public var errorDescription: String? { message }
}

private let errorBytes = 2048

/// Calls the C API with a buffer for its line, and throws that line unless all went well.
func checked(_ call: (UnsafeMutablePointer<CChar>, Int) -> cfmoe_status) throws {
  var line = [CChar](repeating: 0, count: errorBytes)
  let status = line.withUnsafeMutableBufferPointer { buffer in call(buffer.baseAddress!, buffer.count) }
  guard status != CFMOE_OK else { return }
  let message = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
  switch status {
  case CFMOE_USER: throw CFMoEError.user(message)
  case CFMOE_CANCELLED: throw CFMoEError.cancelled
  default: throw CFMoEError.fault(message)
  }
}
