// Numbers as the screens show them.
import CFMoEKit
import Foundation

func placementText(_ placement: Placement) -> String {
  if placement.prefill == placement.decode { return deviceText(placement.decode) }
  return "\(deviceText(placement.prefill)) reads, \(deviceText(placement.decode)) writes"
}

private func deviceText(_ device: Device) -> String { device == .cpu ? "CPU" : "GPU" }

let noValue = "–"

func sizeText(_ bytes: UInt64) -> String { ByteCountFormatter.string(fromByteCount: Int64(clamping: bytes), countStyle: .memory) }
func sizeText(_ bytes: Double?) -> String { bytes.map { sizeText(UInt64(max(0, $0))) } ?? noValue }
func speedText(_ tokensPerSecond: Double?) -> String { tokensPerSecond.map { String(format: "%.1f tokens/s", $0) } ?? noValue }
func shareText(_ share: Double?) -> String { share.map { String(format: "%.1f %%", 100 * $0) } ?? noValue }
