// swift-tools-version: 6.0
// CFMoEKit: the engine, model import and view models of the iOS app, on Foundation alone, so that Linux tests all of it.
import PackageDescription

let package = Package(
  name: "CFMoEKit",
  platforms: [.iOS(.v15), .macOS(.v12)],
  products: [.library(name: "CFMoEKit", targets: ["CFMoEKit"])],
  targets: [
    .systemLibrary(name: "CCFMoE"),
    .systemLibrary(name: "CZlib"),
    .target(
      name: "CFMoEKit",
      dependencies: ["CCFMoE", "CZlib"],
      // On Linux the shared library, found by -Xlinker -L; in the app Xcode links the static one.
      linkerSettings: [.linkedLibrary("cfmoe", .when(platforms: [.linux]))]
    ),
    .testTarget(name: "CFMoEKitTests", dependencies: ["CFMoEKit"]),
  ],
  swiftLanguageModes: [.v6]
)
