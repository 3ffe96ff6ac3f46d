"""Reads the answer out of what a model wrote, and compares it with the right one. Nothing is ever evaluated as code."""

from __future__ import annotations

import re
from fractions import Fraction

LETTERS = "ABCDEFGHIJ"

_NUMBER = re.compile(r"[-−]?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?%?")
_MARKED = re.compile(r"####\s*(.*)|(?:answer|option)(?: is)?\s*[:=]?\s*([^\n]*)", re.IGNORECASE)
_LETTER = re.compile(
    r"(?<![A-Za-z0-9'])\(?([A-J])(?:\s?[).:]|\s*$)"  # "B)", "(B)", "B.", or the letter as the last word
    r"|(?<![A-Za-z0-9'])\(?([a-j])(?:\s?\)|\s*$)"  # in lower case not before a full stop, as in "e.g."
    r"|^\s*([A-J])(?=\s*[\n,;–-])",
    re.MULTILINE,
)
_YES = ("yes", "true")
_NO = ("no", "false")
_TOLERANCE = Fraction(1, 10_000)


def parse_number(text: str) -> Fraction | None:
    """The number that `text` gives as its answer: after the last "####" or "answer is", else the last number in it; None without one.

    Thousands separators, a currency sign and a percent sign are dropped; 3/4 is a fraction.
    """
    for marked in reversed(list(_MARKED.finditer(text))):
        value = _numbers(marked[1] or marked[2] or "")
        if value:
            return value[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    values = []
    for match in _NUMBER.finditer(text):
        digits = re.sub(r"[,$\s%]", "", match[0]).replace("−", "-")
        if not any(character.isdigit() for character in digits):
            continue
        if digits.startswith("-") and match.start() and (text[match.start() - 1].isalnum() or text[match.start() - 1] in ")]"):
            digits = digits[1:]  # a minus between two operands is no sign
        above, _, below = digits.partition("/")
        if below and not int(below):
            continue
        values.append(Fraction(above) / (int(below) if below else 1))
    return values


def same_number(one: Fraction | None, other: Fraction | None) -> bool:
    """Whether both are numbers and differ by at most a ten-thousandth of the larger one (answers are given rounded)."""
    if one is None or other is None:
        return False
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


def parse_boolean(text: str) -> bool | None:
    """The first yes, true, no or false in `text` as a word of its own."""
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _YES or word in _NO:
            return word in _YES
    return None


def parse_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that `text` chooses: after the last "answer is", else a letter that stands as one, else an option's wording.

    A letter counts where it is written as one, "B", "(B)" or "B)", and is among those of `options`.
    """
    marked = [match[1] or match[2] or "" for match in _MARKED.finditer(text)]
    for part in [*reversed(marked), text]:
        for match in _LETTER.finditer(part):
            letter = next(filter(None, match.groups())).upper()
            if LETTERS.index(letter) < len(options):
                return letter
    wording = _plain(text)
    named = [letter for letter, option in zip(LETTERS, options, strict=False) if _plain(option) and _plain(option) in wording]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
