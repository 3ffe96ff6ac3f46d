// Files by descriptor: reads at an offset into a buffer of ours, writes that say why they failed.
import Foundation

/// Of a failed system call on `path`; `what` is the verb.
func systemError(_ path: String, _ what: String) -> CFMoEError {
  let code = errno
  if code == ENOSPC { return .user("\(path) cannot be written: the device is full; free some memory and import the model again") }
  return .user("\(path) cannot be \(what): \(String(cString: strerror(code)))")
}

/// Bytes that can be read from any offset, forward at best.
protocol ByteReader: AnyObject {
  /// For the line of an error.
  var path: String { get }
  /// No less than there are to read.
  var size: UInt64 { get }
  /// Fills `buffer`; throws where the bytes end before.
  func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws
}

extension ByteReader {
  func bytes(at offset: UInt64, count: Int) throws -> [UInt8] {
    guard offset <= size, UInt64(count) <= size - offset else { throw endsTooSoon }
    var out = [UInt8](repeating: 0, count: count)
    try out.withUnsafeMutableBytes { try read(into: $0, at: offset) }
    return out
  }

  /// Hands out `count` bytes from `offset` on, piece by piece.
  func forEachPiece(at offset: UInt64, count: UInt64, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
    let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(min(count, 1 << 20)), alignment: 16)
    defer { buffer.deallocate() }
    var done: UInt64 = 0
    while done < count {
      let piece = UnsafeMutableRawBufferPointer(rebasing: buffer.prefix(Int(min(count - done, UInt64(buffer.count)))))
      try read(into: piece, at: offset + done)
      try body(UnsafeRawBufferPointer(piece))
      done += UInt64(piece.count)
    }
  }

  var endsTooSoon: CFMoEError { .user("\(path) ends too soon: copy it again") }
}

/// A regular file open for reading.
final class InputFile: ByteReader {
  let path: String
  let size: UInt64
  private let descriptor: Int32

  /// Refuses what is no regular file, symbolic links too.
  init(_ path: String) throws {
    self.path = path
    descriptor = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK)
    guard descriptor >= 0 else { throw systemError(path, "opened") }
    var status = stat()
    guard fstat(descriptor, &status) == 0, status.st_mode & S_IFMT == S_IFREG else {
      close(descriptor)
      throw CFMoEError.user("\(path) is no regular file: give the model itself")
    }
    size = UInt64(status.st_size)
  }

  deinit { close(descriptor) }

  func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws {
    guard offset <= size, UInt64(buffer.count) <= size - offset else { throw endsTooSoon }
    var done = 0
    while done < buffer.count {
      let got = pread(descriptor, buffer.baseAddress! + done, buffer.count - done, off_t(offset) + off_t(done))
      if got < 0 && errno == EINTR { continue }
      guard got >= 0 else { throw systemError(path, "read") }
      guard got > 0 else { throw endsTooSoon }
      done += got
    }
  }
}

/// A new file open for writing.
final class OutputFile {
  private let path: String
  private let descriptor: Int32

  init(_ path: String) throws {
    self.path = path
    descriptor = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0o644)
    guard descriptor >= 0 else { throw systemError(path, "written") }
  }

  deinit { close(descriptor) }

  func write(_ bytes: UnsafeRawBufferPointer) throws {
    var done = 0
    while done < bytes.count {
      #if canImport(Darwin)
        let put = Darwin.write(descriptor, bytes.baseAddress! + done, bytes.count - done)
      #else
        let put = Glibc.write(descriptor, bytes.baseAddress! + done, bytes.count - done)
      #endif
      if put < 0 && errno == EINTR { continue }
      guard put >= 0 else { throw systemError(path, "written") }
      done += put
    }
  }

  /// Sees that the bytes are on the device.
  func synchronise() throws {
    guard fsync(descriptor) == 0 else { throw systemError(path, "written") }
  }
}
