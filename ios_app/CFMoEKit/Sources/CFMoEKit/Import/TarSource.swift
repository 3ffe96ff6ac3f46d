// Tar archives, also gzipped: ustar, with the long names and large sizes of GNU tar and of pax.
import Foundation

final class TarSource: ArtifactSource {
  private struct Entry {
    var offset: UInt64
    var size: UInt64
  }

  private let file: any ByteReader
  private let entries: [String: Entry]
  var files: [String: UInt64] { entries.mapValues(\.size) }

  private static let block: UInt64 = 512
  private static let mostHeaderBytes: UInt64 = 1 << 20

  /// nil where the file is no tar archive; throws where it is a damaged one.
  init?(_ file: any ByteReader) throws {
    guard file.size >= Self.block, Self.hasChecksum(try file.bytes(at: 0, count: Int(Self.block))) else { return nil }
    self.file = file
    var entries: [String: Entry] = [:]
    var longName: String?
    var longSize: UInt64?
    var offset: UInt64 = 0
    while offset + Self.block <= file.size {
      let header = try file.bytes(at: offset, count: Int(Self.block))
      if header.allSatisfy({ $0 == 0 }) { break }
      guard Self.hasChecksum(header) else { throw CFMoEError.user("\(file.path) is damaged at byte \(offset): copy it again") }
      offset += Self.block
      let type = header[156]
      // Records about the next one have their own size; a pax size is of the entry behind them.
      let isAbout = [UInt8(ascii: "x"), UInt8(ascii: "g"), UInt8(ascii: "L"), UInt8(ascii: "K")].contains(type)
      guard let size = (isAbout ? nil : longSize) ?? Self.number(header[124..<136]), size <= file.size - offset else {
        throw file.endsTooSoon
      }
      switch type {
      case UInt8(ascii: "x"):
        guard size <= Self.mostHeaderBytes else { throw CFMoEError.user("\(file.path) has a header of \(size) bytes: it is damaged") }
        let records = Self.paxRecords(try file.bytes(at: offset, count: Int(size)))
        longName = records["path"] ?? longName
        longSize = records["size"].flatMap(UInt64.init) ?? longSize
      case UInt8(ascii: "L"):
        guard size <= Self.mostHeaderBytes else { throw CFMoEError.user("\(file.path) has a header of \(size) bytes: it is damaged") }
        longName = Self.text(try file.bytes(at: offset, count: Int(size))[...])
      case UInt8(ascii: "g"), UInt8(ascii: "K"):
        break
      default:
        // Anything but a regular file (links, devices, directories) is passed over.
        if type == UInt8(ascii: "0") || type == 0 {
          var path = longName ?? Self.name(header)
          while path.hasPrefix("./") { path.removeFirst(2) }
          guard entries.count < mostEntries else {
            throw CFMoEError.user("\(file.path) holds more than \(mostEntries) files: pack the model alone")
          }
          entries[path] = Entry(offset: offset, size: size)
        }
        longName = nil
        longSize = nil
      }
      offset += (size + Self.block - 1) / Self.block * Self.block
    }
    self.entries = entries
  }

  func position(of path: String) -> UInt64 { entries[path]?.offset ?? 0 }

  func read(_ path: String, _ body: (UnsafeRawBufferPointer) throws -> Void) throws {
    guard let entry = entries[path] else { throw CFMoEError.user("\(file.path) has no \(path): pack the model again") }
    try file.forEachPiece(at: entry.offset, count: entry.size, body)
  }

  /// A header's checksum counts its own eight bytes as blanks.
  private static func hasChecksum(_ header: [UInt8]) -> Bool {
    let sum = header.enumerated().reduce(UInt64(0)) { $0 + UInt64((148..<156).contains($1.offset) ? 32 : $1.element) }
    return number(header[148..<156]) == sum
  }

  /// Octal digits, or with the highest bit set a big-endian number.
  private static func number(_ field: ArraySlice<UInt8>) -> UInt64? {
    if let first = field.first, first & 0x80 != 0 {
      return field.dropFirst().reduce(UInt64?(UInt64(first & 0x7f))) { value, byte in
        guard let value, value < 1 << 55 else { return nil }
        return value << 8 | UInt64(byte)
      }
    }
    let digits = text(field).trimmingCharacters(in: .whitespaces)
    return UInt64(digits, radix: 8)
  }

  private static func text(_ field: ArraySlice<UInt8>) -> String { String(decoding: field.prefix { $0 != 0 }, as: UTF8.self) }

  private static func name(_ header: [UInt8]) -> String {
    let name = text(header[0..<100])
    guard text(header[257..<262]) == "ustar" else { return name }
    let prefix = text(header[345..<500])
    return prefix.isEmpty || header[262] != 0 ? name : "\(prefix)/\(name)"
  }

  /// "LENGTH KEY=VALUE\n", where LENGTH counts the whole record.
  private static func paxRecords(_ bytes: [UInt8]) -> [String: String] {
    var out: [String: String] = [:]
    var rest = bytes[...]
    while let blank = rest.firstIndex(of: UInt8(ascii: " ")), let length = Int(String(decoding: rest[..<blank], as: UTF8.self)),
      length > blank - rest.startIndex + 1, length <= rest.count
    {
      let record = rest[(blank + 1)..<(rest.startIndex + length - 1)]
      if let equals = record.firstIndex(of: UInt8(ascii: "=")) {
        out[String(decoding: record[..<equals], as: UTF8.self)] = String(decoding: record[(equals + 1)...], as: UTF8.self)
      }
      rest = rest.dropFirst(length)
    }
    return out
  }
}
