"""A cfmoe-engine process that speaks docs/serve-stdio.md; every line both ways is checked against the schema."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jsonschema

from support import ROOT

Event = dict[str, Any]


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "docs" / "serve-stdio.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]})


@functools.cache
def host_engine() -> Path:
    """The program as `make test-cpp` builds it, under sanitizers where that one is there; built where none is."""
    for build in ("asan", "dev"):
        program = ROOT / "build" / build / "cfmoe-engine"
        if program.exists():
            return program
    folder = ROOT / "build" / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of parallel workers one builds
        tools = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        for command in (configure, ["cmake", "--build", folder, "--target", "cfmoe_engine"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=tools)
    return folder / "cfmoe-engine"


class EngineProcess:
    """Context manager. `command` is the program, with what must run it before."""

    def __init__(self, command: Sequence[str | Path] | None = None, environment: Mapping[str, str] | None = None) -> None:
        program = [host_engine()] if command is None else list(command)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([*program, "serve-stdio"], env=os.environ | dict(environment or {}), **pipes)
        self.count = 0
        self.ready = self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.process.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.stdout.close()
        code = self.process.wait(timeout=60)
        assert kind is not None or code == 0, f"the engine ended with {code}"

    def send_raw(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def send(self, op: str, **fields: Any) -> int:
        """Sends a request that the schema allows and returns its id."""
        self.count += 1
        request = {"id": self.count, "op": op} | fields
        _validator("request").validate(request)
        self.send_raw(json.dumps(request).encode())
        return self.count

    def read(self) -> Event:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.endswith(b"\n"), f"the engine ended: {line!r}"
        event: Event = json.loads(line)
        _validator("event").validate(event)
        return event

    def events(self, request: int) -> Iterator[Event]:
        """The events of a request up to its last; those of others are dropped."""
        while True:
            event = self.read()
            if event["id"] == request:
                yield event
                if event["event"] != "token":
                    return

    def call(self, op: str, **fields: Any) -> Event:
        """The last event of a request."""
        return list(self.events(self.send(op, **fields)))[-1]

    def generate(self, **fields: Any) -> tuple[list[int], str, Event]:
        """Token ids, text, and the event `done`."""
        *tokens, done = self.events(self.send("generate", **fields))
        assert done["event"] == "done", done
        return [e["token"] for e in tokens], "".join(e["text"] for e in [*tokens, done]), done
