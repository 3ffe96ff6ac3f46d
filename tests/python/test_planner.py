"""The planner: device profiles, footprints, the cost model worked out by hand, knee and cliff."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cfmoe.artifact import Artifact
from cfmoe.compile import compile_model
from cfmoe.compile.footprint import footprint_of_checkpoint
from cfmoe.errors import CFMoEError
from cfmoe.measure.bandwidth import _fit, file_speed, streaming_speed
from cfmoe.planner import footprint
from cfmoe.planner.calibrate import calibrate
from cfmoe.planner.cost import Compute, Speed, predict, roofline
from cfmoe.planner.curve import Point, _cliff, _knee, curve, sizes
from cfmoe.planner.devices import DeviceProfile, find_device, known_devices
from cfmoe.planner.footprint import Footprint
from cfmoe.planner.sweep import cache_slots
from cfmoe.runtime import Counts, Engine, Simulation, Simulator
from cfmoe.trace.synthetic import synthetic_trace
from tiny_families import tiny_checkpoint

# Reading one record of 1,000 bytes: 1 ms + 1,000 / 1e6 = 2 ms; two: 1 ms + 2,000 / 2e6 = 2 ms; four: 1 ms + 4,000 / 2e6 = 3 ms.
DEVICE = DeviceProfile("d", "test", 1e9, 0.5, 0.001, 0.0001, 0.001, 1e6, 2e6)
MODEL = Footprint("m", 2, 8, 2, 6_000, 0, 0, 1_000, 1_000, False)


def simulation(groups: tuple[int, ...], slots: int = 4, prefill_misses: int = 0) -> Simulation:
    return Simulation("lru", slots, Counts(0, prefill_misses), Counts(0, 0), 0, groups)


def test_roofline_by_hand() -> None:
    # 6,000 dense bytes and 2 layers × 2 experts × 1,000 at half of 1e9 B/s are 20 µs; two layers of overhead 2 ms.
    compute = roofline(MODEL, DEVICE)
    assert compute.decode_s == pytest.approx(10_000 / 5e8 + 0.002)
    assert compute.miss_s == 0.0001
    assert not compute.measured


def test_prediction_by_hand() -> None:
    # 10 ms per token; experts are 4,000 of 10,000 active bytes: 4 ms over 4 experts, 1 ms each.
    compute = Compute(0.010, 0.001, 0.0002, measured=True)
    # Of four groups one had no miss, two had one, one had two; two groups make a token.
    # One miss: 2 ms of reading less 1 ms in which the hit computes; two: 2 ms and nothing computes. Mean (0 + 1 + 1 + 2) / 4 = 1 ms.
    # A token waits 2 ms, and its 2 misses (mean of 0, 1, 1, 2, twice) cost the processor 0.4 ms.
    trace = synthetic_trace(12, 2, 8, 2, prompt_tokens=10)
    speed = predict(simulation((1, 2, 1), prefill_misses=30), trace, MODEL, compute, DEVICE)
    assert speed.decode_tokens_per_s == pytest.approx(1 / 0.0124)
    assert speed.stall_share == pytest.approx(2 / 12.4)
    assert speed.bytes_per_token == pytest.approx(2_000)
    # The prompt: 10 tokens take 10 ms and 30 misses 6 ms of the processor, reading 30,000 bytes 15 ms at two reads at a time: 16 ms win.
    # Then 1 ms of latency and one decoded token.
    assert speed.first_token_s == pytest.approx(0.016 + 0.001 + 0.010)


def test_no_prompt_has_no_first_token() -> None:
    compute = Compute(0.010, 0.001, 0.0, measured=True)
    assert predict(simulation((4, 0, 0)), synthetic_trace(4, 2, 8, 2), MODEL, compute, DEVICE).first_token_s is None


def point(budget: int, seconds: float) -> Point:
    return Point(budget, simulation((1,)), Speed(1 / seconds, None, 0.0, 0.0))


def test_knee_and_cliff_by_hand() -> None:
    # Seconds fall from 10 to 2 over budgets 0 to 4; the line is 10, 8, 6, 4, 2, and the curve lies 0.5, 2, 1.5 below it inside.
    points = [point(b, s) for b, s in ((0, 10.0), (1, 7.5), (2, 4.0), (3, 2.5), (4, 2.0))]
    assert _knee(points) is points[2]
    # A tenth faster than 10 s is 9.09 s.
    assert _cliff(points) is points[1]
    flat = [point(b, 10.0) for b in range(3)]
    assert _knee(flat) is flat[0]
    assert _cliff(flat) is None


def test_curve_of_a_trace() -> None:
    trace = synthetic_trace(200, 2, 8, 2, zipf=1.0, stickiness=0.5, prompt_tokens=50)
    with Simulator(trace) as simulator:
        found = curve(simulator, trace, "lru", MODEL, roofline(MODEL, DEVICE), DEVICE)
    assert [one.simulation.slots for one in found.points] == sizes(MODEL)
    assert sizes(MODEL)[0] == 2 and sizes(MODEL)[-1] == 16
    speeds = [one.speed.decode_tokens_per_s for one in found.points]
    assert speeds[-1] == max(speeds)
    assert found.recommended.budget_bytes >= found.knee.budget_bytes
    assert found.recommended.speed.decode_tokens_per_s >= speeds[-1] / 2


def test_budget_and_slots_are_inverse() -> None:
    for slots in (2, 7, 16):
        assert MODEL.slots(MODEL.budget(slots)) == slots
    assert MODEL.slots(10**9) == 16
    with pytest.raises(CFMoEError, match="below the smallest that works, 8000 bytes"):
        MODEL.slots(7_999)


@pytest.mark.parametrize("quant", ["mixed", "f32"])
def test_estimates_agree_with_the_engine(quant: str, demo_model: Path, compiled: Callable[[Path, str], Path]) -> None:
    artifact = Artifact.open(compiled(demo_model, quant))
    with Engine(artifact.path) as engine:
        exact = footprint.of_engine(artifact, engine)
    for estimate in (footprint.of_artifact(artifact), footprint_of_checkpoint(demo_model, quant)):
        assert (estimate.record_bytes, estimate.slot_bytes, estimate.total) == (exact.record_bytes, exact.slot_bytes, exact.total)
        assert estimate.weights_bytes == pytest.approx(exact.weights_bytes, rel=0.02)
        assert estimate.kv_bytes == exact.kv_bytes
        assert abs(estimate.workspace_bytes - exact.workspace_bytes) < 2 << 20
        assert estimate.estimated and not exact.estimated


def test_keys_and_values_of_latent_attention(demo_model: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint("deepseek_v2", tmp_path / "model", demo_model / "tokenizer.json")  # keys of 96 elements, values of 32
    artifact = Artifact.open(compile_model(model, tmp_path / "artifact", quant="q8"))
    with Engine(artifact.path) as engine:
        exact = engine.memory.kv_bytes
    assert footprint.of_artifact(artifact).kv_bytes == footprint_of_checkpoint(model, "q8").kv_bytes == exact


def test_calibration_of_this_machine(demo_artifact: Path) -> None:
    size, compute, device = calibrate(Artifact.open(demo_artifact), context_size=512)
    assert size.total == 192
    assert 0 < compute.decode_s < 1 and 0 < compute.prefill_s < 1 and compute.miss_s >= 0 and compute.measured
    assert device.storage_bytes_per_s > 0 and device.storage_bytes_per_s_2 > 0 and device.storage_latency_s >= 0


def test_storage_fit_by_hand() -> None:
    # 2 ms of latency, 1 MB/s one at a time, 4 MB/s two at a time.
    times = {(count, size): 0.002 + count * size / (1e6 if count == 1 else 4e6) for count in (1, 2, 4) for size in (1_000, 10_000)}
    assert _fit(times) == pytest.approx((0.002, 1e6, 4e6))


def test_file_speed_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(1 << 20))
    assert file_speed(path, (16384,), repeat=2).bytes_per_s > 0
    assert streaming_speed(path, 16384, total=1 << 21) > 0


def test_known_devices_are_sound_and_name_their_source() -> None:
    devices = known_devices()
    assert {"oneplus-15r", "cfmoe-paper"} <= {device.name for device in devices}
    assert all(len(device.source) > 40 for device in devices)
    assert find_device("oneplus-15r").storage_bytes_per_s_2 == pytest.approx(2460 * 2**20, rel=0.01)


def test_device_files(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(json.dumps(DEVICE.as_json()))
    assert find_device(str(path)) == DEVICE
    for change, message in (
        ({"storage_bytes_per_s": 0}, '"storage_bytes_per_s" is 0'),
        ({"storage_latency_s": -1}, "is -1, not a positive number"),
        ({"name": ""}, "\"name\" is ''"),
        ({"memory_bytes_per_s": "fast"}, "is 'fast', not a positive number"),
    ):
        path.write_text(json.dumps(DEVICE.as_json() | change))
        with pytest.raises(CFMoEError, match=message):
            find_device(str(path))
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(CFMoEError, match="no device profile: kernel_efficiency"):
        find_device(str(path))
    path.write_text("{")
    with pytest.raises(CFMoEError, match="is not JSON"):
        find_device(str(path))
    with pytest.raises(CFMoEError, match="neither a file nor one of: oneplus-15r"):
        find_device("nokia-3310")


def test_cache_sizes() -> None:
    trace = synthetic_trace(4, 2, 8, 2)
    assert cache_slots("25%", trace, 0) == 4
    assert cache_slots("7", trace, 0) == 7
    assert cache_slots("999", trace, 0) == 16
    assert cache_slots("5KiB", trace, 1000) == 5
    for text, message in (("101%", "more than all"), ("x", "is no size"), ("1MiB", "give --expert-size")):
        with pytest.raises(CFMoEError, match=message):
            cache_slots(text, trace, 0)


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(CFMoEError, match="3 MoE layers, 8 experts and top-2, m has 2, 8 and top-2"):
        MODEL.check(synthetic_trace(4, 3, 8, 2), "t.trace")
    replace(MODEL, layers=3).check(synthetic_trace(4, 3, 8, 2), "t.trace")
