"""Norms, quantised activations and the pointwise parts of a layer: one row of activations per row of workgroups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, Buffer, Expr, f32
from cfmoe.compile.kernels.gpu.builder import (
    add,
    barrier,
    build,
    float_to_bits,
    i32,
    kept,
    lane,
    let,
    load,
    local,
    parameters,
    reduce_workgroup,
    rint,
    shared,
    sigmoid,
    silu,
    store,
    strided,
    threads,
    when,
)
from cfmoe.compile.kernels.gpu.profile import Profile

_WIDE = 4  # elements of a thread, and codes of a word
_LANES = GROUP // _WIDE  # threads of a group


def row_scalars(rows: int | None) -> list[str]:
    """The scalar that says how many rows there are, where the kernel does not know."""
    return [] if rows is not None else ["n"]


def quantise_words(
    out: Buffer,
    at: Expr,  # word of `out` at which the thread's group starts
    memory: Buffer,  # a fp32 element per thread
    sums: Buffer,  # an int32 element per thread
    thread: Expr,
    values: list[Expr],  # the thread's four
    valid: Expr | None,
) -> None:
    """Quantises groups of 32 that eight neighbouring threads hold; all threads of the workgroup take part."""
    largest = T.fabs(values[0])
    for value in values[1:]:
        largest = T.max(largest, T.fabs(value))
    store(memory, thread, largest)
    barrier()
    member, first = let("member", thread & i32(_LANES - 1)), let("leader", thread - (thread & i32(_LANES - 1)))
    for other in range(_LANES):
        largest = load(memory, first + i32(other)) if other == 0 else T.max(largest, load(memory, first + i32(other)))
    largest = kept("largest", largest)
    inverse = kept("inverse", T.Select(largest > f32(0.0), f32(127.0) / largest, f32(0.0)))
    codes = [let("code", T.Cast("int32", rint(value * inverse))) for value in values]
    word = codes[0] & i32(255)
    for place in range(1, _WIDE):
        word = word | ((codes[place] & i32(255)) << i32(8 * place))
    store(sums, thread, codes[0] + codes[1] + codes[2] + codes[3])
    barrier()
    with when(valid):
        store(out, at + member, word)
    with when(member == i32(0) if valid is None else T.And(member == i32(0), valid)):
        total = load(sums, thread)
        for other in range(1, _LANES):
            total = total + load(sums, thread + i32(other))
        store(out, at + i32(8), float_to_bits(largest / f32(127.0)))
        store(out, at + i32(9), total)
    barrier()


def _rows(rows: int | None, scalars: list[Expr]) -> Expr:
    return i32(rows) if rows is not None else scalars[0]


def quantise(name: str, profile: Profile, rows: int | None, width: int) -> tirx.PrimFunc:
    """(x fp32 [n, width], out int32 [n, width / 32 * 10]; n)."""
    count = profile.row_threads

    def body() -> None:
        (x, out), scalars = parameters(row_scalars(rows), x="float32", out="int32")
        chunk = count * _WIDE
        with threads((-(-width // chunk), _rows(rows, scalars)), (count,)) as ((part, row), (thread,)):
            memory, sums = shared("largest_of", count), shared("sum_of", count, "int32")
            at = let("at", part * i32(chunk) + thread * i32(_WIDE))
            valid = at < i32(width) if width % chunk else None
            safe = let("safe", T.min(at, i32(width - _WIDE))) if valid is not None else at
            vector = let("values", load(x, row * i32(width) + safe, _WIDE))
            group = let("group", row * i32(width // GROUP * 10) + (at >> i32(5)) * i32(10))
            quantise_words(out, group, memory, sums, thread, [lane(vector, i) for i in range(_WIDE)], valid)

    return build(name, body)


def _inverse_rms(x: Buffer, start: Expr, width: int, eps: float, memory: Buffer, thread: Expr, count: int) -> Expr:
    partial = sum_of_squares(x, start, width, thread, count)
    total = reduce_workgroup(memory, thread, count, partial, add)
    return let("inverse_rms", f32(1.0) / T.sqrt(total / f32(float(width)) + f32(eps)))


def sum_of_squares(x: Buffer, start: Expr, width: int, thread: Expr, count: int) -> Expr:
    """The thread's part of the sum of squares of x[start : start + width]."""
    acc = local("acc", 1)
    store(acc, 0, f32(0.0))
    for place in strided("at", thread, count, width // _WIDE):
        with place as at:
            vector = let("values", load(x, start + at * i32(_WIDE), _WIDE))
            v = [lane(vector, i) for i in range(_WIDE)]
            store(acc, 0, load(acc, 0) + (v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]))
    return load(acc, 0)


def rms_norm(name: str, profile: Profile, rows: int | None, width: int, eps: float) -> tirx.PrimFunc:
    """(x fp32 [n, width], weight fp32 [width], out fp32 [n, width]; n). Root mean square layer norm, Zhang & Sennrich 2019."""
    count = profile.row_threads

    def body() -> None:
        (x, weight, out), scalars = parameters(row_scalars(rows), x="float32", weight="float32", out="float32")
        with threads((_rows(rows, scalars),), (count,)) as ((row,), (thread,)):
            memory = shared("memory", count)
            start = let("start", row * i32(width))
            inverse = _inverse_rms(x, start, width, eps, memory, thread, count)
            for place in strided("column", thread, count, width):
                with place as at:
                    store(out, start + at, load(x, start + at) * inverse * load(weight, at))

    return build(name, body)


def rms_norm_quantise(name: str, profile: Profile, rows: int | None, width: int, eps: float, both: bool = False) -> tirx.PrimFunc:
    """(x fp32 [n, width], weight fp32 [width], [normed fp32 [n, width]], out int32 [n, width / 32 * 10]; n): rms_norm, then quantise.

    With `both` the row that is not quantised, too.
    """
    count = profile.row_threads
    names = {"x": "float32", "weight": "float32", **({"normed": "float32"} if both else {}), "out": "int32"}

    def body() -> None:
        buffers, scalars = parameters(row_scalars(rows), **names)
        x, weight, out = buffers[0], buffers[1], buffers[-1]
        with threads((_rows(rows, scalars),), (count,)) as ((row,), (thread,)):
            memory, sums = shared("memory", count), shared("sum_of", count, "int32")
            start = let("start", row * i32(width))
            inverse = _inverse_rms(x, start, width, eps, memory, thread, count)
            for at, safe, valid in _fours(thread, count, width):
                vector = let("values", load(x, start + safe, _WIDE))
                _norm_four(
                    [lane(vector, i) for i in range(_WIDE)],
                    inverse,
                    weight,
                    start,
                    (at, safe, valid),
                    buffers[2] if both else None,
                    (out, let("group", row * i32(width // GROUP * 10) + (at >> i32(5)) * i32(10)), memory, sums, thread),
                )

    return build(name, body)


def _fours(thread: Expr, count: int, width: int) -> Iterator[tuple[Expr, Expr, Expr | None]]:
    """(first of four elements of the thread, the same within the row, whether they are in the row; None: always) until the row ends."""
    chunk = count * _WIDE
    for first in range(0, width, chunk):
        at = let("column", thread * i32(_WIDE) + i32(first))
        valid = at < i32(width) if first + chunk > width else None
        yield at, let("safe", T.min(at, i32(width - _WIDE))) if valid is not None else at, valid


def _norm_four(
    values: list[Expr],
    inverse: Expr,
    weight: Buffer,
    start: Expr,
    place: tuple[Expr, Expr, Expr | None],
    normed: Buffer | None,
    quantised: tuple[Buffer, Expr, Buffer, Buffer, Expr] | None,  # arguments of quantise_words
) -> None:
    """Norms four elements of the row that starts at `start`, into `normed`, as groups of codes, or both."""
    at, safe, valid = place
    scale = let("weights", load(weight, safe, _WIDE))
    values = [let("value", value * inverse * lane(scale, i)) for i, value in enumerate(values)]
    if normed is not None:
        with when(valid):
            for i, value in enumerate(values):
                store(normed, start + at + i32(i), value)
    if quantised is not None:
        quantise_words(*quantised, values, valid)


def combine_norm(name: str, profile: Profile, rows: int | None, width: int, top_k: int, eps: float, quantised: bool) -> tirx.PrimFunc:
    """(residual fp32 [n, width], rows fp32 [n * top_k, width], weights fp32 [n, top_k], norm's weight fp32 [width],
    out fp32 [n, width], normed; n): combine, then rms_norm of what it gives, or rms_norm_quantise.
    """
    count = profile.row_threads

    def body() -> None:
        names = _floats("residual", "rows", "weights", "weight", "out") | {"normed": "int32" if quantised else "float32"}
        (residual, chosen, weights, weight, out, normed), scalars = parameters(row_scalars(rows), **names)
        with threads((_rows(rows, scalars),), (count,)) as ((row,), (thread,)):
            memory = shared("memory", count)
            sums = shared("sum_of", count, "int32") if quantised else None
            start = let("start", row * i32(width))
            acc = local("acc", 1)
            store(acc, 0, f32(0.0))
            for at, _, valid in _fours(thread, count, width):
                with when(valid):
                    v = [kept("total", value) for value in _combined(residual, chosen, weights, row, at, width, top_k)]
                    for i, value in enumerate(v):
                        store(out, start + at + i32(i), value)
                    store(acc, 0, load(acc, 0) + (v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3]))
            total = reduce_workgroup(memory, thread, count, load(acc, 0), add)
            inverse = let("inverse_rms", f32(1.0) / T.sqrt(total / f32(float(width)) + f32(eps)))
            # A thread reads again what it wrote itself.
            for at, safe, valid in _fours(thread, count, width):
                values = [let("element", load(out, start + safe + i32(i))) for i in range(_WIDE)]
                group = let("group", row * i32(width // GROUP * 10) + (at >> i32(5)) * i32(10))
                quantiser = (normed, group, memory, sums, thread) if sums is not None else None
                _norm_four(values, inverse, weight, start, (at, safe, valid), None if quantised else normed, quantiser)

    return build(name, body)


def _combined(residual: Buffer, chosen: Buffer, weights: Buffer, row: Expr, column: Expr, width: int, top_k: int) -> list[Expr]:
    """Four elements of the sum of the experts' rows in routing order."""
    first = let("residual_values", load(residual, row * i32(width) + column, _WIDE))
    totals = [lane(first, i) for i in range(_WIDE)]
    for k in range(top_k):
        at = let("chosen", row * i32(top_k) + i32(k))
        vector, weight = let("row_values", load(chosen, at * i32(width) + column, _WIDE)), let("weight", load(weights, at))
        totals = [total + weight * lane(vector, i) for i, total in enumerate(totals)]
    return totals


def _pointwise(
    name: str, profile: Profile, rows: int | None, width: int, dtypes: dict[str, str], value: Callable[[list[Buffer], Expr, Expr], Expr]
) -> tirx.PrimFunc:
    """A kernel whose last buffer, `out`, is fp32 [n, width]; `value(buffers, row, column)` is an element of it."""
    count = profile.row_threads

    def body() -> None:
        params, scalars = parameters(row_scalars(rows), **dtypes)
        with threads((-(-width // count), _rows(rows, scalars)), (count,)) as ((part, row), (thread,)):
            column = let("column", part * i32(count) + thread)
            with when(column < i32(width) if width % count else None):
                store(params[-1], row * i32(width) + column, value(params, row, column))

    return build(name, body)


def _floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "float32")


def add_rows(name: str, profile: Profile, rows: int | None, width: int) -> tirx.PrimFunc:
    """(a fp32 [n, width], b fp32 [n, width], out fp32 [n, width]; n): a + b."""

    def value(p: list[Buffer], row: Expr, column: Expr) -> Expr:
        at = let("at", row * i32(width) + column)
        return load(p[0], at) + load(p[1], at)

    return _pointwise(name, profile, rows, width, _floats("a", "b", "out"), value)


def silu_mul(name: str, profile: Profile, rows: int | None, width: int) -> tirx.PrimFunc:
    """(gate_up fp32 [n, 2 * width], out fp32 [n, width]; n): silu(gate) * up, gate first."""

    def value(p: list[Buffer], row: Expr, column: Expr) -> Expr:
        at = let("at", row * i32(2 * width) + column)
        return silu(let("gate", load(p[0], at))) * load(p[0], at + i32(width))

    return _pointwise(name, profile, rows, width, _floats("gate_up", "out"), value)


def gated_add(name: str, profile: Profile, rows: int | None, width: int, gate_width: int) -> tirx.PrimFunc:
    """(x fp32 [n, width], gate fp32 [n, gate_width], residual fp32 [n, width], out; n): residual + sigmoid(gate[:, 0]) * x."""

    def value(p: list[Buffer], row: Expr, column: Expr) -> Expr:
        at = let("at", row * i32(width) + column)
        return load(p[2], at) + sigmoid(load(p[1], row * i32(gate_width))) * load(p[0], at)

    return _pointwise(name, profile, rows, width, _floats("x", "gate", "residual", "out"), value)


def combine(name: str, profile: Profile, rows: int | None, width: int, top_k: int) -> tirx.PrimFunc:
    """(residual fp32 [n, width], rows fp32 [n * top_k, width], weights fp32 [n, top_k], out fp32 [n, width]; n).

    Sums the experts' rows in routing order.
    """

    def value(p: list[Buffer], row: Expr, column: Expr) -> Expr:
        total = let("total", load(p[0], row * i32(width) + column))
        for k in range(top_k):
            chosen = let("chosen", row * i32(top_k) + i32(k))
            total = let("total", total + load(p[2], chosen) * load(p[1], chosen * i32(width) + column))
        return total

    return _pointwise(name, profile, rows, width, _floats("residual", "rows", "weights", "out"), value)


def latent_heads(name: str, profile: Profile, rows: int | None, heads: int, rope: int, nope: int, value_dim: int) -> tirx.PrimFunc:
    """(q fp32 [n, heads * (rope + nope)], k_rope fp32 [n, rope], kv fp32 [n, heads * (nope + value_dim)], out fp32 [n, …]; n).

    Expands latent attention to plain heads; see kernels/attention.py.
    """
    dim = rope + nope
    width = heads * (2 * dim + value_dim)

    def value(p: list[Buffer], row: Expr, column: Expr) -> Expr:
        q, k_rope, kv, _ = p
        key = let("key", column - i32(heads * dim))
        head = let("head", T.truncdiv(key, i32(dim)))
        within = let("within", key - head * i32(dim))
        expanded = T.if_then_else(
            within < i32(rope),
            load(k_rope, row * i32(rope) + within),
            load(kv, row * i32(heads * (nope + value_dim)) + head * i32(nope) + within - i32(rope)),
        )
        values = load(kv, row * i32(heads * (nope + value_dim)) + i32(heads * nope) + column - i32(2 * heads * dim))
        return T.if_then_else(
            column < i32(heads * dim),
            load(q, row * i32(heads * dim) + column),
            T.if_then_else(column < i32(2 * heads * dim), expanded, values),
        )

    return _pointwise(name, profile, rows, width, _floats("q", "k_rope", "kv", "out"), value)
