"""The documents: links lead somewhere, files and make targets that are named exist, commands have the options that are shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cfmoe.cli.app import app
from support import ROOT

APPS = sorted([*ROOT.glob("*_app/README.md"), *ROOT.glob("assets/*/*.md")])
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *APPS]
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"(?<![\w./-])((?:tests|benchmarks|scripts|runtime_ext|compile|common|tune|ios_app|android_app|assets)/[\w./-]+\.\w+)"
)
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchor(heading: str) -> str:
    """What a heading is called in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = document if not name else document.parent / name
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link


@documents
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text("utf-8")
    missing = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists() and not (document.parent / name).exists()]
    assert missing == []


def commands(document: Path, program: str) -> Iterator[list[str]]:
    """The words of every command line of `program` in blocks and in inline code, without what follows a pipe or a comment."""
    text = document.read_text("utf-8")
    blocks = [*FENCE.findall(text), *INDENTED.findall(text), *re.findall(r"`([^`\n]+)`", FENCE.sub("", text))]
    for line in (line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines()):
        if re.match(rf"{program} [a-z]", line):
            yield shlex.split(re.split(r"[|;&]", line)[0], comments=True)[1:]


@cache
def command_tree() -> Any:
    return typer.main.get_command(app)


def options_of(words: list[str]) -> tuple[str, set[str], list[str]]:
    """The command's name, the options that it has, and the words behind its name."""
    command, name = command_tree(), []
    while hasattr(command, "commands") and words and words[0] in command.commands:
        name.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return " ".join(name), {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}, words


@documents
def test_commands_have_the_options_that_are_shown(document: Path) -> None:
    for words in commands(document, "cfmoe"):
        name, options, rest = options_of(words)
        assert name, f"cfmoe {' '.join(words)}: no such command"
        shown = {re.split("[=]", word)[0] for word in rest if re.match(r"--[a-z]", word)}
        assert shown <= options | {"--help"}, f"cfmoe {name} has no {', '.join(sorted(shown - options))}"


@documents
def test_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in commands(document, "make"):
        assert {word for word in words if re.fullmatch("[a-z][a-z-]*", word)} <= targets, words


def test_the_checks_see_what_they_check(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    blocks = "```\ncfmoe run m --wrong 1  # so\n```\n\n    make nothing\n\n`cfmoe export gguf m --out x`\n"
    document.write_text("# A b\n[x](#a-b) [y](none.md)\n" + blocks)
    assert list(commands(document, "cfmoe")) == [["run", "m", "--wrong", "1"], ["export", "gguf", "m", "--out", "x"]]
    assert list(commands(document, "make")) == [["nothing"]]
    assert options_of(["export", "gguf", "m"])[0] == "export gguf"
    assert anchor("What was run, and what was not") == "what-was-run-and-what-was-not"
    for check in (test_links_lead_somewhere, test_commands_have_the_options_that_are_shown, test_make_targets_exist):
        with pytest.raises(AssertionError):
            check(document)


def test_the_file_tree_of_the_readme_is_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    tree = text[text.index("## File tree") : text.index("## Documents")]
    paths = [line.split()[0] for line in FENCE.findall(tree)[0].splitlines()]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    packages = {path for path in (ROOT / "common" / "cfmoe").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert {f"common/cfmoe/{path.name}/" for path in packages} <= set(paths)
    listed = re.findall(r"\]\((docs/\w[\w-]*\.md)\)", text)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {Path(name).name for name in listed}
