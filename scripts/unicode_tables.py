#!/usr/bin/env python
"""Writes runtime_ext/src/tokenizer/unicode_tables.h: which characters are letters, numbers and white space.

The classes are those of the package `tokenizers`, asked character by character, so that the runtime cuts text where it does.
Run as: .venv/bin/python scripts/unicode_tables.py
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, pre_tokenizers

OUT = Path(__file__).resolve().parents[1] / "runtime_ext" / "src" / "tokenizer" / "unicode_tables.h"
CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
CLASSES = {"kLetters": r"\p{L}", "kNumbers": r"\p{N}", "kSpaces": r"\s"}


def members(pattern: str) -> list[int]:
    """Code points that the pattern matches."""
    # Removed where they match, so what is left says which did not.
    split = pre_tokenizers.Split(Regex(pattern), "removed")
    found = []
    for start in range(0, len(CHARACTERS), 4096):
        block = CHARACTERS[start : start + 4096]
        left = {c for piece, _ in split.pre_tokenize_str("".join(block)) for c in piece}
        found += [ord(c) for c in block if c not in left]
    return found


def numeric() -> list[int]:
    """Code points that the pre-tokenizer Digits takes for one."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return [ord(c) for c in CHARACTERS if len(digits.pre_tokenize_str(f"a{c}b")) == 3]


def ranges(points: list[int]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for point in points:
        if out and out[-1][1] == point - 1:
            out[-1] = (out[-1][0], point)
        else:
            out.append((point, point))
    return out


def main() -> None:
    tables = {name: members(pattern) for name, pattern in CLASSES.items()} | {"kDigits": numeric()}
    text = "// Inclusive ranges of code points, ascending. Written by scripts/unicode_tables.py.\n#pragma once\n\n#include <cstdint>\n\n"
    text += "namespace cfmoe::unicode {\n\nstruct Range {\n  uint32_t first, last;\n};\n"
    for name, points in tables.items():
        text += f"\n// clang-format off\ninline constexpr Range {name}[] = {{\n"
        cells = [f"{{{a:#x}, {b:#x}}}" for a, b in ranges(points)]
        text += "".join("  " + ", ".join(cells[i : i + 6]) + ",\n" for i in range(0, len(cells), 6)) + "};\n// clang-format on\n"
    OUT.write_text(text + "\n}  // namespace cfmoe::unicode\n")


if __name__ == "__main__":
    main()
