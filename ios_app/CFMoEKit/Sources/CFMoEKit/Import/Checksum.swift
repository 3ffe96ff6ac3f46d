// SHA-256 of a stream of bytes: the system's where it has one, otherwise our own.
import Foundation

#if canImport(CryptoKit)
  import CryptoKit

  struct Checksum {
    private var hash = CryptoKit.SHA256()
    mutating func update(_ bytes: UnsafeRawBufferPointer) { hash.update(bufferPointer: bytes) }
    mutating func finish() -> String { hexadecimal(hash.finalize()) }
  }
#else
  /// FIPS 180-4.
  struct Checksum {
    private var state: [UInt32] = [
      0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
    ]
    private var pending: [UInt8] = []
    private var length: UInt64 = 0
    private static let blockBytes = 64

    mutating func update(_ bytes: UnsafeRawBufferPointer) {
      length += UInt64(bytes.count)
      var rest = bytes[...]
      if !pending.isEmpty {
        let taken = min(Self.blockBytes - pending.count, rest.count)
        pending.append(contentsOf: rest.prefix(taken))
        rest = rest.dropFirst(taken)
        guard pending.count == Self.blockBytes else { return }
        pending.withUnsafeBytes { Self.compress(&state, $0) }
        pending.removeAll(keepingCapacity: true)
      }
      let whole = rest.count / Self.blockBytes * Self.blockBytes
      if whole > 0 { Self.compress(&state, UnsafeRawBufferPointer(rebasing: rest.prefix(whole))) }
      pending.append(contentsOf: rest.dropFirst(whole))
    }

    mutating func finish() -> String {
      let bits = length * 8
      var tail: [UInt8] = [0x80]
      while (pending.count + tail.count) % Self.blockBytes != Self.blockBytes - 8 { tail.append(0) }
      tail += (0..<8).map { UInt8(truncatingIfNeeded: bits >> UInt64(56 - 8 * $0)) }
      tail.withUnsafeBytes { update($0) }
      return hexadecimal(state.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> UInt32(24 - 8 * $0)) } })
    }

    private static func compress(_ state: inout [UInt32], _ blocks: UnsafeRawBufferPointer) {
      withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { schedule in
        constants.withUnsafeBufferPointer { constants in
          for begin in stride(from: 0, to: blocks.count, by: blockBytes) {
            for i in 0..<16 { schedule[i] = UInt32(bigEndian: blocks.loadUnaligned(fromByteOffset: begin + 4 * i, as: UInt32.self)) }
            for i in 16..<64 {
              let early = schedule[i - 15]
              let late = schedule[i - 2]
              let small0 = rotate(early, 7) ^ rotate(early, 18) ^ (early >> 3)
              let small1 = rotate(late, 17) ^ rotate(late, 19) ^ (late >> 10)
              schedule[i] = schedule[i - 16] &+ small0 &+ schedule[i - 7] &+ small1
            }
            var (a, b, c, d) = (state[0], state[1], state[2], state[3])
            var (e, f, g, h) = (state[4], state[5], state[6], state[7])
            for i in 0..<64 {
              let big1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)
              let first = h &+ big1 &+ ((e & f) ^ (~e & g)) &+ constants[i] &+ schedule[i]
              let big0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)
              let second = big0 &+ ((a & b) ^ (a & c) ^ (b & c))
              (h, g, f, e, d, c, b, a) = (g, f, e, d &+ first, c, b, a, first &+ second)
            }
            state[0] &+= a
            state[1] &+= b
            state[2] &+= c
            state[3] &+= d
            state[4] &+= e
            state[5] &+= f
            state[6] &+= g
            state[7] &+= h
          }
        }
      }
    }

    @inline(__always) private static func rotate(_ word: UInt32, _ by: UInt32) -> UInt32 { word >> by | word << (32 - by) }

    /// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
    private static let constants: [UInt32] = {
      var primes: [UInt64] = []
      var candidate: UInt64 = 2
      while primes.count < 64 {
        if primes.allSatisfy({ candidate % $0 != 0 }) { primes.append(candidate) }
        candidate += 1
      }
      return primes.map { prime in
        // floor(2^32 * cbrt(p)), exactly: bisection over integers of up to 35 bits, whose cubes take 105.
        var low: UInt64 = 0
        var high: UInt64 = 8 << 32
        while high - low > 1 {
          let middle = (low + high) / 2
          let square = middle.multipliedFullWidth(by: middle)
          let (lowHigh, lowLow) = square.low.multipliedFullWidth(by: middle)
          let upper = square.high * middle + lowHigh
          let isAbove = upper > prime << 32 || (upper == prime << 32 && lowLow > 0)
          if isAbove { high = middle } else { low = middle }
        }
        return UInt32(truncatingIfNeeded: low)
      }
    }()
  }
#endif

private func hexadecimal(_ bytes: some Sequence<UInt8>) -> String {
  let digits = Array("0123456789abcdef")
  return String(bytes.flatMap { [digits[Int($0 >> 4)], digits[Int($0 & 15)]] })
}
