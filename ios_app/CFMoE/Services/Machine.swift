// Which machine this is, for benchmark reports.
import Foundation

/// Such as "iPhone15,2".
func machineName() -> String {
  var name = utsname()
  uname(&name)
  return withUnsafeBytes(of: &name.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}
