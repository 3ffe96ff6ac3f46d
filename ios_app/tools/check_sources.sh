#!/usr/bin/env bash
# Checks the app's Swift sources on Linux: all of them parse for arm64-apple-ios, and the app type-checks against tools/stubs and the
# built CFMoEKit.
# Run in a Swift root as: check_sources.sh BUILD, where BUILD is the scratch path of a `swift build` of CFMoEKit. Needs nothing of Apple's.
# $CFMOE_REPLACE names a file that is checked in place of the app's of the same name.
set -euo pipefail
: "${CFMOE_REPLACE:=}"
build=${1:?the scratch path of swift build}
here=$(cd "$(dirname "$0")" && pwd)
app=$here/../CFMoE kit=$here/../CFMoEKit
modules=$build/debug/Modules
[ -e "$modules/CFMoEKit.swiftmodule" ] || modules=$build/debug
stubs=$build/stubs
mkdir -p "$stubs"
mapfile -t sources < <(find "$app" "$kit/Sources" "$kit/Package.swift" -name '*.swift' | sort)
for source in "${sources[@]}"; do
  swiftc -frontend -parse -target arm64-apple-ios15.0 -swift-version 6 "$source"
done
echo "parsed ${#sources[@]} sources for arm64-apple-ios15.0"

# Foundation's additions belong to the modules that the app imports with it.
for module in UniformTypeIdentifiers os AppleFoundation UIKit SwiftUI; do
  extra=()
  [ "$module" = SwiftUI ] && extra=(-Xfrontend -import-module -Xfrontend AppleFoundation)
  swiftc -emit-module -parse-as-library -swift-version 6 -suppress-warnings -module-name "$module" -I "$stubs" "${extra[@]}" \
    -emit-module-path "$stubs/$module.swiftmodule" "$here/stubs/$module.swift"
done
mapfile -t app_sources < <(find "$app" -name '*.swift' | sort)
for i in "${!app_sources[@]}"; do
  [ "${app_sources[i]##*/}" = "${CFMOE_REPLACE##*/}" ] && app_sources[i]=$CFMOE_REPLACE
done
swiftc -typecheck -parse-as-library -swift-version 6 -warnings-as-errors -module-name CFMoE \
  -I "$stubs" -I "$modules" -I "$kit/Sources/CCFMoE" -I "$kit/Sources/CZlib" -Xfrontend -import-module -Xfrontend AppleFoundation "${app_sources[@]}"
echo "type-checked ${#app_sources[@]} sources of the app against the stubs"
