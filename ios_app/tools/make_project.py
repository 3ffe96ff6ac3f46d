#!/usr/bin/env python3
"""Writes CFMoE.xcodeproj/project.pbxproj from the files that are there; run it after adding or removing a source file.

Names of objects are digests of what they stand for, so the same files give the same project. Standard library only.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

APP = Path(__file__).resolve().parents[1]
PROJECT = APP / "CFMoE.xcodeproj" / "project.pbxproj"
BUNDLE_ID = "org.cfmoe.app"
DEPLOYMENT_TARGET = "15.0"

# What `cfmoe package --platform ios` puts beside the project.
LIBRARY = "Libraries/CFMoE.xcframework"
MODELS = "Model"
# The runtime's Metal device, compiled by Xcode because only Apple's SDK has its headers.
METAL = "../runtime_ext/src/device/metal"

TYPES = {
    ".swift": "sourcecode.swift",
    ".mm": "sourcecode.cpp.objcpp",
    ".h": "sourcecode.c.h",
    ".xcassets": "folder.assetcatalog",
    ".plist": "text.plist.xml",
    ".entitlements": "text.plist.entitlements",
    ".xcprivacy": "text.xml",
    ".xcframework": "wrapper.xcframework",
}
FRAMEWORKS = ("Foundation", "Metal")


def key(what: str) -> str:
    """An object's name: 24 hexadecimal digits."""
    return hashlib.sha256(what.encode()).hexdigest()[:24].upper()


@dataclass
class Project:
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, what: str, isa: str, **fields: Any) -> str:
        self.objects[key(what)] = {"isa": isa, **fields}
        return key(what)


def app_entries(directory: Path) -> Iterator[Path]:
    """What a group shows, in order: an asset catalogue is one entry."""
    yield from sorted(path for path in directory.iterdir() if not path.name.startswith("."))


def build() -> Project:
    project = Project()
    sources: list[str] = []
    resources: list[str] = []

    def file(path: str, source_tree: str = "<group>", **fields: Any) -> str:
        kind = TYPES.get(Path(path).suffix, "file")
        return project.add(f"file {path}", "PBXFileReference", lastKnownFileType=kind, path=path, sourceTree=source_tree, **fields)

    def build_file(what: str, reference: str, **fields: Any) -> str:
        return project.add(f"build {what}", "PBXBuildFile", fileRef=reference, **fields)

    def group(directory: Path) -> str:
        children = []
        for path in app_entries(directory):
            relative = path.relative_to(APP).as_posix()
            if path.is_dir() and path.suffix != ".xcassets":
                children.append(group(path))
                continue
            kind = TYPES[path.suffix]
            reference = project.add(f"file {relative}", "PBXFileReference", lastKnownFileType=kind, path=path.name, sourceTree="<group>")
            children.append(reference)
            if path.suffix in (".swift", ".mm"):
                sources.append(build_file(relative, reference))
            elif path.suffix in (".xcassets", ".xcprivacy"):
                resources.append(build_file(relative, reference))
        name = directory.relative_to(APP).as_posix()
        return project.add(f"group {name}", "PBXGroup", children=children, path=directory.name, sourceTree="<group>")

    app = group(APP / "CFMoE")
    metal_files = []
    for path in sorted((APP / METAL).glob("*")):
        if path.suffix in (".mm", ".h"):
            reference = file(f"{METAL}/{path.name}", "SOURCE_ROOT", name=path.name)
            metal_files.append(reference)
            if path.suffix == ".mm":
                sources.append(build_file(f"{METAL}/{path.name}", reference))
    metal = project.add("group metal", "PBXGroup", children=metal_files, name="Metal device", sourceTree="<group>")

    library = file(LIBRARY, "SOURCE_ROOT", name=Path(LIBRARY).name)
    models = project.add("file models", "PBXFileReference", lastKnownFileType="folder", path=MODELS, sourceTree="SOURCE_ROOT")
    resources.append(build_file(MODELS, models))
    kit_folder = project.add("file kit", "PBXFileReference", lastKnownFileType="wrapper", path="CFMoEKit", sourceTree="SOURCE_ROOT")
    frameworks = [build_file(LIBRARY, library)]
    framework_files = []
    for name in FRAMEWORKS:
        reference = project.add(
            f"framework {name}",
            "PBXFileReference",
            lastKnownFileType="wrapper.framework",
            name=f"{name}.framework",
            path=f"System/Library/Frameworks/{name}.framework",
            sourceTree="SDKROOT",
        )
        framework_files.append(reference)
        frameworks.append(build_file(f"framework {name}", reference))
    package = project.add("package", "XCLocalSwiftPackageReference", relativePath="CFMoEKit")
    product = project.add("kit product", "XCSwiftPackageProductDependency", productName="CFMoEKit", package=package)
    frameworks.append(project.add("build kit", "PBXBuildFile", productRef=product))

    app_file = project.add(
        "product",
        "PBXFileReference",
        explicitFileType="wrapper.application",
        includeInIndex="0",
        path="CFMoE.app",
        sourceTree="BUILT_PRODUCTS_DIR",
    )
    products = project.add("group products", "PBXGroup", children=[app_file], name="Products", sourceTree="<group>")
    linked = project.add("group frameworks", "PBXGroup", children=[library, *framework_files], name="Frameworks", sourceTree="<group>")
    main = project.add("group main", "PBXGroup", children=[app, kit_folder, metal, models, linked, products], sourceTree="<group>")

    def phase(isa: str, files: list[str]) -> str:
        return project.add(f"phase {isa}", isa, buildActionMask="2147483647", files=files, runOnlyForDeploymentPostprocessing="0")

    phases = [
        phase("PBXSourcesBuildPhase", sources),
        phase("PBXFrameworksBuildPhase", frameworks),
        phase("PBXResourcesBuildPhase", resources),
    ]
    target = project.add(
        "target",
        "PBXNativeTarget",
        buildConfigurationList=configurations(project, "target", target_settings()),
        buildPhases=phases,
        buildRules=[],
        dependencies=[],
        name="CFMoE",
        packageProductDependencies=[product],
        productName="CFMoE",
        productReference=app_file,
        productType="com.apple.product-type.application",
    )
    project.add(
        "project",
        "PBXProject",
        attributes={"BuildIndependentTargetsInParallel": "1", "LastSwiftUpdateCheck": "1600", "LastUpgradeCheck": "1600"},
        buildConfigurationList=configurations(project, "project", project_settings()),
        compatibilityVersion="Xcode 14.0",
        developmentRegion="en",
        hasScannedForEncodings="0",
        knownRegions=["en", "Base"],
        mainGroup=main,
        packageReferences=[package],
        productRefGroup=products,
        projectDirPath="",
        projectRoot="",
        targets=[target],
    )
    return project


def configurations(project: Project, owner: str, settings: dict[str, dict[str, Any]]) -> str:
    names = []
    for name, values in settings.items():
        names.append(project.add(f"{owner} {name}", "XCBuildConfiguration", buildSettings=values, name=name))
    return project.add(
        f"{owner} configurations",
        "XCConfigurationList",
        buildConfigurations=names,
        defaultConfigurationIsVisible="0",
        defaultConfigurationName="Release",
    )


def project_settings() -> dict[str, dict[str, Any]]:
    common = {
        "ALWAYS_SEARCH_USER_PATHS": "NO",
        "CLANG_CXX_LANGUAGE_STANDARD": "c++20",
        "CLANG_CXX_LIBRARY": "libc++",
        "CLANG_ENABLE_MODULES": "YES",
        "CLANG_ENABLE_OBJC_ARC": "YES",
        "GCC_C_LANGUAGE_STANDARD": "c11",
        "IPHONEOS_DEPLOYMENT_TARGET": DEPLOYMENT_TARGET,
        "SDKROOT": "iphoneos",
        "SWIFT_VERSION": "6.0",
    }
    return {
        "Debug": {
            **common,
            "DEBUG_INFORMATION_FORMAT": "dwarf",
            "GCC_OPTIMIZATION_LEVEL": "0",
            "ONLY_ACTIVE_ARCH": "YES",
            "SWIFT_OPTIMIZATION_LEVEL": "-Onone",
        },
        "Release": {
            **common,
            "DEBUG_INFORMATION_FORMAT": "dwarf-with-dsym",
            "SWIFT_COMPILATION_MODE": "wholemodule",
            "VALIDATE_PRODUCT": "YES",
        },
    }


def target_settings() -> dict[str, dict[str, Any]]:
    common = {
        "ASSETCATALOG_COMPILER_APPICON_NAME": "AppIcon",
        "ASSETCATALOG_COMPILER_GLOBAL_ACCENT_COLOR_NAME": "AccentColor",
        "CODE_SIGN_ENTITLEMENTS": "CFMoE/Resources/CFMoE.entitlements",
        "CODE_SIGN_STYLE": "Automatic",
        "CURRENT_PROJECT_VERSION": "1",
        "EXCLUDED_ARCHS[sdk=iphonesimulator*]": "x86_64",
        "GENERATE_INFOPLIST_FILE": "NO",
        "HEADER_SEARCH_PATHS": ["$(inherited)", "$(SRCROOT)/../runtime_ext/src"],
        "INFOPLIST_FILE": "CFMoE/Resources/Info.plist",
        "LD_RUNPATH_SEARCH_PATHS": ["$(inherited)", "@executable_path/Frameworks"],
        "MARKETING_VERSION": "0.1.0",
        # Kernels register themselves when they are loaded; nothing names them, so the linker would leave them out.
        "OTHER_LDFLAGS": ["$(inherited)", "-all_load", "-lc++"],
        "PRODUCT_BUNDLE_IDENTIFIER": BUNDLE_ID,
        "PRODUCT_NAME": "$(TARGET_NAME)",
        "SUPPORTED_PLATFORMS": "iphoneos iphonesimulator",
        "TARGETED_DEVICE_FAMILY": "1,2",
    }
    return {"Debug": common, "Release": common}


def quote(text: str) -> str:
    plain = text and all(c.isascii() and (c.isalnum() or c in "_./") for c in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def write_value(value: Any, indent: str) -> str:
    if isinstance(value, dict):
        rows = "".join(f"{indent}\t{quote(name)} = {write_value(value[name], indent + chr(9))};\n" for name in sorted(value))
        return "{\n" + rows + indent + "}"
    if isinstance(value, list):
        return "(\n" + "".join(f"{indent}\t{write_value(item, indent + chr(9))},\n" for item in value) + indent + ")"
    return quote(value)


def text() -> str:
    """The project file as it should be."""
    project = build()
    out = ["// !$*UTF8*$!\n{\n\tarchiveVersion = 1;\n\tclasses = {\n\t};\n\tobjectVersion = 60;\n\tobjects = {\n"]
    for isa in sorted({fields["isa"] for fields in project.objects.values()}):
        out.append(f"\n/* Begin {isa} section */\n")
        for name, fields in sorted(project.objects.items()):
            if fields["isa"] == isa:
                rest = {field: value for field, value in fields.items() if field != "isa"}
                rows = "".join(f"\t\t\t{quote(field)} = {write_value(rest[field], chr(9) * 3)};\n" for field in sorted(rest))
                out.append(f"\t\t{name} = {{\n\t\t\tisa = {isa};\n{rows}\t\t}};\n")
        out.append(f"/* End {isa} section */\n")
    out.append(f"\t}};\n\trootObject = {key('project')};\n}}\n")
    return "".join(out)


def main() -> int:
    PROJECT.parent.mkdir(exist_ok=True)
    PROJECT.write_text(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
