// Zip archives: stored and deflated members, zip64 for more than 4 GiB.
import CZlib
import Foundation

final class ZipSource: ArtifactSource {
  private struct Entry {
    var header: UInt64  // of the member, from the file's start
    var packed: UInt64
    var size: UInt64
    var method: UInt64
  }

  private static let stored: UInt64 = 0, deflated: UInt64 = 8
  private static let endBytes = 22, mostComment = 65_535, mostDirectoryBytes: UInt64 = 64 << 20

  private let file: InputFile
  private let entries: [String: Entry]
  var files: [String: UInt64] { entries.mapValues(\.size) }

  /// nil where the file is no zip archive; throws where it is a damaged one, or encrypted.
  init?(_ file: InputFile) throws {
    guard file.size >= UInt64(Self.endBytes), try file.bytes(at: 0, count: 2) == Array("PK".utf8) else { return nil }
    self.file = file
    let damaged = CFMoEError.user("\(file.path) is a damaged zip archive: copy it again")
    let tailBytes = Int(min(file.size, UInt64(Self.endBytes + Self.mostComment)))
    let tailOffset = file.size - UInt64(tailBytes)
    let tail = try file.bytes(at: tailOffset, count: tailBytes)
    guard
      let end = stride(from: tailBytes - Self.endBytes, through: 0, by: -1).first(where: {
        tail.littleEndian($0, 4) == 0x0605_4b50 && $0 + Self.endBytes + Int(tail.littleEndian($0 + 20, 2)) == tailBytes
      })
    else { throw damaged }
    var count = tail.littleEndian(end + 10, 2)
    var directoryBytes = tail.littleEndian(end + 12, 4)
    var directory = tail.littleEndian(end + 16, 4)
    if end >= 20, tail.littleEndian(end - 20, 4) == 0x0706_4b50 {
      let record = try file.bytes(at: tail.littleEndian(end - 12, 8), count: 56)
      guard record.littleEndian(0, 4) == 0x0606_4b50 else { throw damaged }
      count = record.littleEndian(32, 8)
      directoryBytes = record.littleEndian(40, 8)
      directory = record.littleEndian(48, 8)
    }
    guard count <= UInt64(mostEntries), directoryBytes <= Self.mostDirectoryBytes else {
      throw CFMoEError.user("\(file.path) holds more than \(mostEntries) files: pack the model alone")
    }
    var entries: [String: Entry] = [:]
    var rest = try file.bytes(at: directory, count: Int(directoryBytes))[...]
    for _ in 0..<count {
      let row = Array(rest.prefix(46))
      guard row.count == 46, row.littleEndian(0, 4) == 0x0201_4b50 else { throw damaged }
      let nameBytes = Int(row.littleEndian(28, 2))
      let extraBytes = Int(row.littleEndian(30, 2))
      let commentBytes = Int(row.littleEndian(32, 2))
      guard rest.count >= 46 + nameBytes + extraBytes + commentBytes else { throw damaged }
      rest = rest.dropFirst(46)
      let name = String(decoding: rest.prefix(nameBytes), as: UTF8.self)
      let extra = Array(rest.dropFirst(nameBytes).prefix(extraBytes))
      rest = rest.dropFirst(nameBytes + extraBytes + commentBytes)
      var entry = Entry(
        header: row.littleEndian(42, 4), packed: row.littleEndian(20, 4), size: row.littleEndian(24, 4), method: row.littleEndian(10, 2))
      guard Self.applyZip64(extra, to: &entry) else { throw damaged }
      let unixType = row.littleEndian(38, 4) >> 16 & UInt64(S_IFMT)
      let isFile = !name.hasSuffix("/") && (unixType == 0 || unixType == UInt64(S_IFREG))
      guard isFile else { continue }
      guard row.littleEndian(8, 2) & 1 == 0 else { throw CFMoEError.user("\(file.path) is encrypted: pack the model without a password") }
      entries[name] = entry
    }
    self.entries = entries
  }

  /// Sizes and offsets that did not fit 32 bits stand in the extra field 1, in this order.
  private static func applyZip64(_ extra: [UInt8], to entry: inout Entry) -> Bool {
    var at = 0
    while at + 4 <= extra.count {
      let size = Int(extra.littleEndian(at + 2, 2))
      guard at + 4 + size <= extra.count else { return false }
      if extra.littleEndian(at, 2) == 1 {
        var field = at + 4
        for path in [\Entry.size, \Entry.packed, \Entry.header] where entry[keyPath: path] == 0xffff_ffff {
          guard field + 8 <= at + 4 + size else { return false }
          entry[keyPath: path] = extra.littleEndian(field, 8)
          field += 8
        }
      }
      at += 4 + size
    }
    return true
  }

  func read(_ path: String, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
    guard let entry = entries[path] else { throw CFMoEError.user("\(file.path) has no \(path): pack the model again") }
    let header = try file.bytes(at: entry.header, count: 30)
    guard header.littleEndian(0, 4) == 0x0403_4b50 else { throw CFMoEError.user("\(file.path) is a damaged zip archive: copy it again") }
    let data = entry.header + 30 + header.littleEndian(26, 2) + header.littleEndian(28, 2)
    switch entry.method {
    case Self.stored: try file.forEachPiece(at: data, count: min(entry.packed, entry.size), body)
    case Self.deflated: try inflate(entry, data, path, body)
    default:
      throw CFMoEError.user("\(file.path) packs \(path) by method \(entry.method), which this app does not read: pack it as plain zip")
    }
  }

  private func inflate(_ entry: Entry, _ data: UInt64, _ path: String, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
    let damaged = CFMoEError.user("\(file.path): \(path) is damaged: copy the archive again")
    var stream = z_stream()
    // Negative: deflate's own form, without zlib's header.
    guard inflateInit2_(&stream, -MAX_WBITS, ZLIB_VERSION, Int32(MemoryLayout<z_stream>.size)) == Z_OK else { throw damaged }
    defer { inflateEnd(&stream) }
    let out = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
    defer { out.deallocate() }
    var left = entry.size
    var status = Z_OK
    try file.forEachPiece(at: data, count: entry.packed) { piece in
      stream.next_in = UnsafeMutablePointer(mutating: piece.bindMemory(to: UInt8.self).baseAddress)
      stream.avail_in = UInt32(piece.count)
      guard status == Z_OK else { throw damaged }  // bytes behind the end
      repeat {
        stream.next_out = out.bindMemory(to: UInt8.self).baseAddress
        stream.avail_out = UInt32(out.count)
        status = CZlib.inflate(&stream, Z_NO_FLUSH)
        if status == Z_BUF_ERROR { status = Z_OK }  // nothing to do but to wait for more
        guard status == Z_OK || status == Z_STREAM_END else { throw damaged }
        let made = out.count - Int(stream.avail_out)
        // More than the directory says: an archive that would fill the device.
        guard UInt64(made) <= left else { throw damaged }
        left -= UInt64(made)
        if made > 0 { try body(UnsafeRawBufferPointer(rebasing: out.prefix(made))) }
      } while status == Z_OK && stream.avail_out == 0
      guard stream.avail_in == 0 else { throw damaged }
    }
    guard left == 0, status == Z_STREAM_END else { throw damaged }
  }
}
