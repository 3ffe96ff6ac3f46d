"""The kernels that quantise weights while a checkpoint is converted; they run on the machine that compiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import (
    GROUP,
    TILE,
    Buffer,
    Expr,
    absolute,
    build,
    f32,
    i64,
    let,
    load,
    local,
    loop,
    rint,
    splat,
    store,
    symbol,
    tensor,
)
from cfmoe.compile.kernels.matmul import FORMATS

LANES = 16
_VECTOR = f"float32x{LANES}"
_INT = f"int32x{LANES}"
# Shrinking the scale below the one that just holds the largest weight costs that weight and helps the other 31; for bell-shaped groups the
# best factor lies in this range. The largest weight may take code -8 or +7, so both are tried.
_SHRINK_FIRST, _SHRINK_STEP, _SHRINK_COUNT = 0.72, 0.03, 12
_DIVISORS = (-8.0, 7.0)


def _half(vector: Expr) -> Expr:
    """Rounds to what fp16 holds, as fp32."""
    return let(T.Cast(_VECTOR, T.Cast(f"float16x{LANES}", vector)))


def _inverse(scale: Expr) -> Expr:
    zero = splat(f32(0.0), LANES)
    return let(T.Select(scale == zero, zero, splat(f32(1.0), LANES) / scale))


def _codes(value: Expr, inverse: Expr, low: float, high: float) -> Expr:
    rounded = rint(value * inverse, _VECTOR)
    return let(T.max(T.min(rounded, splat(f32(high), LANES)), splat(f32(low), LANES)))


def _largest(values: list[Expr]) -> tuple[Expr, Expr]:
    """Per output: the largest magnitude of the group, and that weight with its sign."""
    top, bottom = values[0], values[0]
    for value in values[1:]:
        top, bottom = let(T.max(top, value)), let(T.min(bottom, value))
    magnitude = let(T.max(absolute(top, _VECTOR), absolute(bottom, _VECTOR)))
    return magnitude, let(T.Select(top == magnitude, top, bottom))


def _search(value: Callable[[Expr], Expr], extreme: Expr) -> tuple[Buffer, Buffer]:
    """Per output, the scale of least squared error and the inverse that chose its codes.

    For given codes c the best scale is <c, w> / <c, c>; the error is then |w|² - s (2 <c, w> - s <c, c>), so maximising the second term
    is enough.
    """
    gain, scale, inverse = local(LANES), local(LANES), local(LANES)
    sums = [(local(LANES), local(LANES)) for _ in _DIVISORS]  # <c, c> and <c, w>
    store(gain, splat(f32(-1.0), LANES), i64(0), lanes=LANES)
    for buffer in (scale, inverse):
        store(buffer, splat(f32(0.0), LANES), i64(0), lanes=LANES)
    # TIR's loops, not Python's: unrolled, compiling this takes minutes. Both divisors side by side, so that neither waits for its own sums.
    with loop(_SHRINK_COUNT) as step:
        shrink = let(f32(_SHRINK_FIRST) + T.Cast("float32", step) * f32(_SHRINK_STEP))
        trials = [_inverse(_half(extreme * splat(let(shrink / f32(divisor)), LANES))) for divisor in _DIVISORS]
        for buffer in itertools.chain(*sums):
            store(buffer, splat(f32(0.0), LANES), i64(0), lanes=LANES)
        with loop(GROUP) as k:
            weight = let(value(k))
            for trial, pair in zip(trials, sums, strict=True):
                code = _codes(weight, trial, -8.0, 7.0)
                for buffer, other in zip(pair, (code, weight), strict=True):
                    store(buffer, load(buffer, i64(0), lanes=LANES) + code * other, i64(0), lanes=LANES)
        for trial, pair in zip(trials, sums, strict=True):
            norm, dot = (let(load(buffer, i64(0), lanes=LANES)) for buffer in pair)
            fitted = _half(dot / T.max(norm, splat(f32(1.0), LANES)))
            won = let(fitted * (splat(f32(2.0), LANES) * dot - fitted * norm))
            best = let(load(gain, i64(0), lanes=LANES))
            for buffer, candidate in ((scale, fitted), (inverse, trial), (gain, won)):
                kept = let(load(buffer, i64(0), lanes=LANES))
                store(buffer, T.Select(won > best, candidate, kept), i64(0), lanes=LANES)
    return scale, inverse


def quantiser(name: str, format_name: str, source: str) -> tirx.PrimFunc:
    """(weights [tiles, 32 outputs, groups, 32 inputs], out int32 [tiles, groups, block words]) for q4 (searched scales) and q8 (largest /
    127). `source` is the weights' type: float32, or uint16 for the bits of bfloat16.
    """
    fmt = FORMATS[format_name]
    four_bit = fmt.codes_per_word == 8

    def widened(value: Expr) -> Expr:
        if source == "float32":
            return value
        return T.reinterpret("float32", T.Cast("uint32", value) << tirx.IntImm("uint32", 16))

    def body() -> None:
        tiles, groups = symbol(), symbol()
        weights = tensor("weights", (tiles, TILE, groups, GROUP), source)
        out = tensor("out", (tiles, groups, fmt.words), "int32")
        block = local(GROUP * TILE)
        with loop(tiles) as tile, loop(groups) as group:
            # A row's group is one cache line of bf16: all of it is taken before the next row's.
            with loop(TILE) as output, loop(GROUP) as k:
                T.buffer_store(block, widened(weights[tile, output, group, k]), [k * i64(TILE) + output])
            with loop(TILE // LANES) as part:
                _part(block, out, tile, group, let(part * i64(LANES)))

    def _part(block: Buffer, out: Buffer, tile: Expr, group: Expr, column: Expr) -> None:
        values = [load(block, i64(k * TILE) + column, lanes=LANES) for k in range(GROUP)]
        magnitude, extreme = _largest(values)
        if four_bit:
            found, chosen = _search(lambda k: load(block, k * i64(TILE) + column, lanes=LANES), extreme)
            scale, inverse = load(found, i64(0), lanes=LANES), let(load(chosen, i64(0), lanes=LANES))
        else:
            scale = _half(magnitude / splat(f32(127.0), LANES))
            inverse = _inverse(scale)
        _write(out, (tile, group), column, values, let(scale), inverse)

    def _write(out: Buffer, block: tuple[Expr, Expr], column: Expr, values: list[Expr], scale: Expr, inverse: Expr) -> None:
        low, high = (-8.0, 7.0) if four_bit else (-127.0, 127.0)
        per = fmt.codes_per_word
        for word in range(GROUP // per):
            packed = splat(tirx.IntImm("int32", 0), LANES)
            for at in range(per):
                code = T.Cast(_INT, _codes(values[word * per + at], inverse, low, high)) + splat(tirx.IntImm("int32", fmt.zero), LANES)
                shift = at % 4 * 8 + at // 4 * 4 if four_bit else at * 8
                packed = let(packed | (code << splat(tirx.IntImm("int32", shift), LANES)))
            store(out, packed, *block, i64(word * TILE) + column, lanes=LANES)
        halves = T.reinterpret(f"int32x{LANES // 2}", T.Cast(f"float16x{LANES}", scale))
        store(out, halves, *block, i64(GROUP // per * TILE) + T.floordiv(column, i64(2)), lanes=LANES // 2)

    return build(name, {}, body)
