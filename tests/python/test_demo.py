"""cfmoe demo: the table, the report page and what they say."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

from support import Cli


def test_demo(cli: Cli, tmp_path: Path) -> None:
    start = time.monotonic()
    result = cli("demo", "--out", tmp_path / "demo", "--json", timeout=180)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start < 180
    value = json.loads(result.stdout)
    assert value["texts_equal"] is True
    runs = value["runs"]
    assert list(runs) == ["100%", "50%", "25%"]
    assert len({tuple(run["token_ids"]) for run in runs.values()}) == 1
    assert [run["memory"]["expert_slots"] for run in runs.values()] == [192, 96, 48]
    rates = [run["decode"]["chr"] for run in runs.values()]
    assert rates == sorted(rates, reverse=True)
    read = [run["decode"]["bytes_read"] for run in runs.values()]
    assert read == sorted(read)

    page = Path(value["report"]).read_text("utf-8")
    assert page.count("<svg") == 4
    assert not re.search(r'(src|href)="(?!#)', page), "the page has to be self-contained"
    assert "#0505" not in page, "a placeholder colour was left in a figure"
    _Balanced().check(page)
    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == runs


def test_demo_replaces_its_own_output_only(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "demo" / "artifact").mkdir(parents=True)
    (tmp_path / "demo" / "artifact" / "thesis.txt").write_text("years of work")
    result = cli("demo", "--out", tmp_path / "demo")
    assert result.returncode == 2
    assert "--force replaces artifacts only" in result.stderr
    assert (tmp_path / "demo" / "artifact" / "thesis.txt").exists()


class _Balanced(HTMLParser):
    """Fails where an element is closed that was not the last opened."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def check(self, page: str) -> None:
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
