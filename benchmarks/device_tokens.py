"""Whether a device writes the CPU's tokens: greedy, after three prompts, at three budgets, and again from the middle of an answer.

Needs nothing but Python and a cfmoe-engine, so that it runs where only those were copied to. The artifact holds kernels of both:

    python benchmarks/device_tokens.py ARTIFACT --engine build/dev/cfmoe-engine --device vulkan

Prints a JSON object per budget. Ends with 1 where a token differs, as it may where activations are quantised (docs/gpu.md, Numerics).
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from typing import Any

NEW_TOKENS, AGAIN_FROM = 64, 20
PROMPTS = ([(31 * i + 7) % 8000 + 10 for i in range(64)], [(57 * i + 11) % 8000 + 10 for i in range(300)], list(range(100, 140)))


class Engine:
    """A cfmoe-engine that serves this process."""

    def __init__(self, program: str) -> None:
        self._process = subprocess.Popen([program, "serve-stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        event: dict[str, Any] = json.loads(self._process.stdout.readline())
        if event["event"] == "error":
            raise SystemExit(event["message"])
        return event

    def call(self, op: str, **fields: object) -> tuple[list[int], dict[str, Any]]:
        """The tokens that came, and the event that ended the request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, **fields}) + "\n")
        self._process.stdin.flush()
        tokens = []
        while (event := self._read())["event"] == "token":
            tokens.append(event["token"])
        return tokens, event


def answers(program: str, artifact: str, device: str, percent: int) -> tuple[list[int], str, float]:
    """All tokens in a row, the device's name, and decode's hit rate."""
    engine = Engine(program)
    _, loaded = engine.call("load", artifact=artifact, device=device, expert_percent=percent)
    tokens = []
    for prompt in PROMPTS:
        tokens += engine.call("generate", tokens=prompt, max_new_tokens=NEW_TOKENS, stop_tokens=[], reset=True)[0]
    position = len(PROMPTS[-1]) + AGAIN_FROM
    new, done = engine.call("generate", tokens=[17, 18, 19], max_new_tokens=16, stop_tokens=[], position=position)
    engine.call("quit")
    return tokens + new, loaded["device_name"] or "cpu", done["metrics"]["decode"]["chr"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--engine", default="build/dev/cfmoe-engine")
    parser.add_argument("--device", default="vulkan")
    given = parser.parse_args(arguments)
    expected, _, _ = answers(given.engine, given.artifact, "cpu", 100)
    differs = False
    for percent in (100, 50, 25):
        tokens, name, chr_ = answers(given.engine, given.artifact, given.device, percent)
        equal = sum(one == other for one, other in zip(tokens, expected, strict=True))
        differs |= equal < len(expected)
        print(json.dumps({"device": name, "expert_percent": percent, "tokens": len(expected), "equal": equal, "chr": round(chr_, 3)}))
    return int(differs)


if __name__ == "__main__":
    raise SystemExit(main())
