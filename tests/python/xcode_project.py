"""Reads Xcode projects as Xcode does: where the files lie that they refer to, and what their settings name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def file_paths(project: Any, directory: Path) -> dict[str, Path]:
    """Where each file reference of the project lies, by the reference's name."""
    found: dict[str, Path] = {}
    roots = {"SOURCE_ROOT": directory}

    def walk(group: Any, base: Path) -> None:
        for key in group.children:
            item = project.objects[key]
            path = item.get("path", None)
            where = roots.get(item.sourceTree, base)
            if item.isa == "PBXGroup":
                walk(item, where / path if path else where)
            elif item.sourceTree in ("<group>", "SOURCE_ROOT"):
                found[key] = Path(os.path.normpath(where / path))

    walk(project.objects[project.objects[project.rootObject].mainGroup], directory)
    return found


def settings_paths(project: Any, directory: Path) -> dict[str, Path]:
    """The files and directories that build settings name, by setting and value; `directory` is the project's."""
    found: dict[str, Path] = {}
    for row in project.objects.get_objects_in_section("XCBuildConfiguration"):
        for name in ("INFOPLIST_FILE", "CODE_SIGN_ENTITLEMENTS", "HEADER_SEARCH_PATHS"):
            if name not in row.buildSettings:
                continue
            values = row.buildSettings[name]
            for value in [values] if isinstance(values, str) else values:
                if value != "$(inherited)":
                    found[f"{name} {value}"] = directory / re.sub(r"^\$\(SRCROOT\)/", "", value)
    return found
