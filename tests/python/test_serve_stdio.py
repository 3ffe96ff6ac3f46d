"""The engine as a child process: the protocol's requests, errors as data, and what it says is what the library says."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

import artifacts
from cfmoe.runtime import Engine, Sampling, Tokenizer
from engine_process import EngineProcess, host_engine

PROMPT = "The proposal adds"


def test_a_conversation_is_the_one_of_the_library(demo_artifact: Path) -> None:
    tokenizer = Tokenizer(demo_artifact)
    with Engine(demo_artifact) as engine, engine.session() as session:
        first = session.generate(tokenizer.encode(PROMPT), 30)
        second = session.generate(tokenizer.encode(" — naïve 日本"), 20, Sampling(0.9, top_k=50, seed=5), stop_tokens=[])
        position = session.position
    with EngineProcess() as process:
        assert process.ready["event"] == "ready"
        loaded = process.call("load", artifact=str(demo_artifact), expert_percent=25)
        assert loaded["event"] == "loaded" and loaded["text"] and loaded["memory"]["expert_slots"] == 48
        tokens, text, done = process.generate(prompt=PROMPT, max_new_tokens=30)
        assert tokens == first.token_ids and text == tokenizer.decode(tokens)
        assert done["finish_reason"] == first.finish_reason
        sampling = {"temperature": 0.9, "top_k": 50, "seed": 5}
        tokens, text, done = process.generate(prompt=" — naïve 日本", max_new_tokens=20, stop_tokens=[], **sampling)
        assert (tokens, text) == (second.token_ids, tokenizer.decode(second.token_ids))
        assert done["position"] == position and done["metrics"]["decode"]["tokens"] == len(first.token_ids) + len(tokens) - 2
        again, _, _ = process.generate(tokens=tokenizer.encode(PROMPT), max_new_tokens=30, reset=True)
        assert again == first.token_ids
        position = len(tokenizer.encode(PROMPT)) + len(again)
        for _ in range(2):
            turn = process.generate(prompt=" — naïve 日本", max_new_tokens=20, stop_tokens=[], position=position, **sampling)
            assert turn[0] == second.token_ids
        process.send("generate", prompt="x", position=100000)
        assert "cannot go back to 100000" in process.read()["message"]
        assert process.call("reset", keep_experts=True)["event"] == "ok"
        assert process.generate(tokens=tokenizer.encode(PROMPT), max_new_tokens=30)[0] == first.token_ids


def test_a_prompt_in_pieces(demo_artifact: Path) -> None:
    """One text, in which special tokens count only where they were not typed."""
    with EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact))
        begin, typed = "<|user|>Is", " <|assistant|> a token?\n"

        def prompt_tokens(prompt: object) -> int:
            return process.generate(prompt=prompt, max_new_tokens=1, stop_tokens=[], reset=True)[2]["prompt_tokens"]

        whole = prompt_tokens(begin + typed)
        assert prompt_tokens([{"text": begin}, {"text": typed}]) == prompt_tokens([{"text": begin + typed, "typed": False}]) == whole
        assert prompt_tokens([{"text": begin, "typed": None}, {"text": typed, "typed": True}]) > whole
        for wrong in ([{"typed": True}], [{"text": "x", "typed": 1}], [{"text": "x", "kind": "y"}], ["x"], [], 7):
            process.send_raw(json.dumps({"op": "generate", "prompt": wrong}).encode())
            assert process.read()["kind"] == "user"
        assert prompt_tokens(begin + typed) == whole


def test_devices_are_listed_and_chosen(demo_artifact: Path) -> None:
    # A driver of this machine may put its own signal stack in the place of the sanitizer's, and leave memory behind.
    with EngineProcess(environment={"ASAN_OPTIONS": "use_sigaltstack=0:detect_leaks=0"}) as process:
        listed = process.call("devices")
        assert listed["event"] == "devices"
        for kind in ("vulkan", "metal"):
            refused = process.call("load", artifact=str(demo_artifact), prefill_device=kind)  # compiled for the CPU alone
            assert refused["event"] == "error" and refused["kind"] == "user" and kind in refused["message"].lower()
        loaded = process.call("load", artifact=str(demo_artifact), device="cpu", decode_device="cpu")
        assert (loaded["prefill_device"], loaded["decode_device"], loaded["device_name"]) == ("cpu", "cpu", "")


def test_budgets_metrics_and_cancel_while_tokens_come(demo_artifact: Path) -> None:
    with EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact), expert_percent=100)
        expected, _, _ = process.generate(prompt=PROMPT, max_new_tokens=200, stop_tokens=[])
        request = process.send("generate", prompt=PROMPT, max_new_tokens=2000, stop_tokens=[], reset=True)
        tokens = []
        for event in process.events(request):
            if event["event"] == "token":
                tokens.append(event["token"])
            if len(tokens) == 5:
                break
        budget = process.send("set_budget", expert_percent=10)
        trim = process.send("trim")
        metrics = process.send("metrics")
        seen = []
        while len(seen) < 3:
            event = process.read()
            if event["id"] == request:
                assert event["event"] == "token", "served only after the end"
                tokens.append(event["token"])
            else:
                seen.append(event)
        assert [e["id"] for e in seen] == [budget, trim, metrics]
        # The trim may have come before.
        assert seen[0]["memory"]["expert_slots"] in (19, 4) and seen[1]["memory"]["expert_slots"] in (19, 4)
        assert [len(row) for row in seen[2]["residents"]] == [32] * 6
        assert sum(row.count("1") for row in seen[2]["residents"]) == seen[2]["memory"]["expert_slots"]
        cancel = process.send("cancel")
        answered = False
        for_request = None
        while for_request is None or not answered:
            event = process.read()
            answered = answered or event["id"] == cancel
            if event["id"] == request and event["event"] == "done":
                for_request = event
            elif event["id"] == request:
                tokens.append(event["token"])
        assert for_request["finish_reason"] == "cancelled" and for_request["new_tokens"] == len(tokens) < 2000
        assert tokens[:200] == expected[: len(tokens)]
        assert process.generate(prompt=PROMPT, max_new_tokens=200, stop_tokens=[], reset=True)[0] == expected


def test_memory_falls_after_a_trim(demo_artifact: Path) -> None:
    with EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact), expert_percent=100, io="direct")
        process.generate(tokens=[(31 * i + 7) % 8000 + 10 for i in range(700)], max_new_tokens=4, stop_tokens=[])
        before = process.call("metrics")["memory"]
        after = process.call("trim")["memory"]
        freed = before["pool_bytes"] - after["pool_bytes"]
        assert freed > 4 << 20
        assert before["rss_bytes"] - after["rss_bytes"] >= 0.7 * freed
        assert process.call("unload")["event"] == "ok"
        assert process.call("metrics")["loaded"] is False


def test_bad_requests_are_answered_and_outlived(demo_artifact: Path, tmp_path: Path) -> None:
    with EngineProcess() as process:

        def refused(line: bytes, kind: str, *parts: str) -> None:
            process.send_raw(line)
            event = process.read()
            assert event["event"] == "error" and event["kind"] == kind, event
            for part in parts:
                assert part in event["message"], event

        refused(b"not json", "protocol", "not valid JSON")
        refused(b"[1, 2]", "protocol", "expected an object")
        refused(b'{"id": 7}', "protocol", "op", "missing")
        refused(b'{"op": "fly"}', "protocol", "is not one of")
        refused(b'{"op": "generate", "prompt": "x"}', "user", "send load first")
        refused(b'{"op": "load"}', "user", "artifact", "missing")
        refused(b'{"op": "load", "artifact": "/nowhere"}', "user", "not a directory")
        refused(b"[" * 100_000, "protocol", "nested")
        refused(b'{"op": "metrics", "x": "' + b"a" * (9 << 20) + b'"}', "protocol", "more than")
        refused(b'{"op": "metrics", "speed": 1}', "user", "speed", "unknown")
        good = json.dumps(str(demo_artifact)).encode()
        refused(b'{"op": "load", "artifact": ' + good + b', "memory_budget": 1000}', "user", "smallest that works")
        assert process.call("load", artifact=str(demo_artifact))["event"] == "loaded"
        refused(b'{"op": "load", "artifact": ' + good + b"}", "user", "unload first")
        refused(b'{"op": "generate"}', "user", "prompt or tokens")
        refused(b'{"op": "generate", "tokens": [99999]}', "user", "outside the model's vocabulary")
        refused(b'{"op": "generate", "tokens": []}', "user", "no tokens")
        refused(b'{"op": "generate", "prompt": "\xff"}', "user", "UTF-8")
        refused(b'{"op": "generate", "prompt": "x", "top_p": 7}', "user", "top-p")
        refused(b'{"op": "set_budget", "memory_budget": 5, "expert_percent": 3}', "user", "not both")
        assert len(process.generate(prompt=PROMPT, max_new_tokens=8, stop_tokens=[])[0]) == 8


def test_an_unknown_tokenizer_leaves_token_ids(tmp_path: Path, demo_artifact: Path) -> None:
    broken = artifacts.write(tmp_path / "a", tokenizer=b'{"model": {}}')
    with EngineProcess() as process:
        # This artifact's kernels are no library: the engine says so and lives.
        assert process.call("load", artifact=str(broken))["event"] == "error"
        assert process.call("load", artifact=str(demo_artifact))["text"]


def test_what_was_asked_before_the_end_of_input_is_done_and_a_closed_output_ends_it(demo_artifact: Path) -> None:
    load = json.dumps({"op": "load", "artifact": str(demo_artifact)})
    ask = json.dumps({"op": "generate", "prompt": PROMPT, "max_new_tokens": 6, "stop_tokens": []})
    result = subprocess.run(
        [host_engine(), "serve-stdio"], input=f"{load}\n{ask}\n\n", capture_output=True, text=True, timeout=60, check=True
    )
    assert [json.loads(line)["event"] for line in result.stdout.splitlines()] == ["ready", "loaded", *["token"] * 6, "done"]
    endless = json.dumps({"op": "generate", "prompt": PROMPT, "max_new_tokens": 2000, "stop_tokens": []})
    process = subprocess.Popen([host_engine(), "serve-stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{load}\n" + f"{endless}\n" * 1000)
    process.stdin.close()
    for _ in range(5):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 0


def test_a_killed_engine_and_another_one_after_it(demo_artifact: Path) -> None:
    with EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact))
        expected = process.generate(prompt=PROMPT, max_new_tokens=20, stop_tokens=[])[0]
    with pytest.raises(AssertionError, match="the engine ended"), EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact))
        events = process.events(process.send("generate", prompt=PROMPT, max_new_tokens=2000, stop_tokens=[]))
        next(events)
        process.process.send_signal(signal.SIGKILL)
        list(events)
    with EngineProcess() as process:
        process.call("load", artifact=str(demo_artifact))
        assert process.generate(prompt=PROMPT, max_new_tokens=20, stop_tokens=[])[0] == expected


@pytest.mark.slow
def test_a_hundred_loads_leave_no_memory_behind(demo_artifact: Path) -> None:
    # The sanitizer keeps what was freed for a while.
    with EngineProcess(environment={"ASAN_OPTIONS": "quarantine_size_mb=1:thread_local_quarantine_size_kb=64"}) as process:
        sizes = []
        for _ in range(100):
            process.call("load", artifact=str(demo_artifact), expert_percent=20)
            process.generate(prompt=PROMPT, max_new_tokens=2)
            assert process.call("unload")["event"] == "ok"
            sizes.append(process.call("metrics")["rss_bytes"])
    assert max(sizes[50:]) <= max(sizes[:50]) + (2 << 20)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_requests_damaged_at_random_never_end_the_engine(seed: int, demo_artifact: Path) -> None:
    source = random.Random(seed)
    valid = [
        {"id": 1, "op": "load", "artifact": str(demo_artifact), "expert_percent": 30, "threads": 1},
        {"id": 2, "op": "generate", "prompt": PROMPT, "max_new_tokens": 3, "temperature": 0.5, "seed": 3, "stop_tokens": [1]},
        {"id": 3, "op": "generate", "tokens": [5, 6, 7], "max_new_tokens": 2, "reset": True},
        {"id": 7, "op": "generate", "prompt": [{"text": "<|user|>"}, {"text": "é<|pad|>", "typed": True}], "max_new_tokens": 1},
        {"id": 4, "op": "set_budget", "expert_percent": 50},
        {"id": 5, "op": "trim", "memory_budget": 20_000_000},
        *({"id": 6, "op": op} for op in ("metrics", "reset", "unload", "cancel")),
    ]
    values = ["0", "-1", "1e308", "null", "[]", "{}", '""', '"\\ud800"', "18446744073709551616", "true", "2147483648", "[[1]]"]
    with EngineProcess() as process:
        asked = 0
        for _ in range(250):
            line = bytearray(json.dumps(source.choice(valid)).encode())
            for _ in range(source.randrange(3)):
                at = source.randrange(len(line))
                match source.randrange(4):
                    case 0:
                        line[at] = source.randrange(256)
                    case 1:
                        del line[at : at + source.randrange(1, 12)]
                    case 2:
                        line[at:at] = line[source.randrange(len(line)) :][:20]
                    case _:
                        begin = line.find(b":", at) + 1
                        ends = [e for e in (line.find(b",", begin), line.find(b"}", begin)) if e > 0]
                        if begin > 0 and ends:
                            line[begin : min(ends)] = source.choice(values).encode()
            line = bytearray(bytes(line).replace(b"\n", b" "))
            # "generate" of a damaged number of tokens may be long: it is cut short.
            if line.strip():
                process.send_raw(bytes(line))
                process.send_raw(b'{"id": "c", "op": "cancel"}')
                asked += 1
        process.count = 1000
        assert process.call("metrics")["event"] == "metrics"
        assert asked > 200
