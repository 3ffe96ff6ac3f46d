// What a gzip file holds, unpacked while it is read: forward at the cost of one pass, backward by beginning anew.
import CZlib
import Foundation

final class GzipReader: ByteReader {
  var path: String { file.path }
  let size = UInt64.max  // told by no header
  private let file: InputFile
  private let input = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
  private let skipped = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
  private var stream = z_stream()
  private var taken: UInt64 = 0  // of the file
  private var made: UInt64 = 0

  /// nil where the file is not gzipped.
  init?(_ file: InputFile) throws {
    self.file = file
    guard file.size >= 18, try file.bytes(at: 0, count: 2) == [0x1f, 0x8b] else { return nil }
    // 16: gzip's header.
    guard inflateInit2_(&stream, 16 + MAX_WBITS, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else {
      throw CFMoEError.fault("\(file.path) cannot be unpacked: zlib does not start")
    }
  }

  deinit {
    inflateEnd(&stream)
    input.deallocate()
    skipped.deallocate()
  }

  func read(into buffer: UnsafeMutableRawBufferPointer, at offset: UInt64) throws {
    if offset < made {
      inflateReset(&stream)
      stream.avail_in = 0
      (taken, made) = (0, 0)
    }
    while made < offset {
      try fill(UnsafeMutableRawBufferPointer(rebasing: skipped.prefix(Int(min(offset - made, UInt64(skipped.count))))))
    }
    try fill(buffer)
  }

  private func fill(_ buffer: UnsafeMutableRawBufferPointer) throws {
    guard !buffer.isEmpty else { return }
    stream.next_out = buffer.bindMemory(to: UInt8.self).baseAddress
    stream.avail_out = UInt32(buffer.count)
    while stream.avail_out > 0 {
      if stream.avail_in == 0 {
        let piece = UnsafeMutableRawBufferPointer(rebasing: input.prefix(Int(min(file.size - taken, UInt64(input.count)))))
        guard !piece.isEmpty else { throw endsTooSoon }
        try file.read(into: piece, at: taken)
        taken += UInt64(piece.count)
        stream.next_in = piece.bindMemory(to: UInt8.self).baseAddress
        stream.avail_in = UInt32(piece.count)
      }
      switch inflate(&stream, Z_NO_FLUSH) {
      case Z_OK, Z_BUF_ERROR: break
      case Z_STREAM_END: inflateReset(&stream)  // another member may follow
      default: throw CFMoEError.user("\(path) is damaged: copy it again")
      }
    }
    made += UInt64(buffer.count)
  }
}
