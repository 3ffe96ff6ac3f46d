"""Rotary embeddings on GPUs: tables of cosines and sines, and the rotation of queries and keys with their norms."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.attention import AttentionShape
from cfmoe.compile.kernels.builder import Buffer, Expr, f32
from cfmoe.compile.kernels.gpu.builder import (
    add,
    build,
    i32,
    let,
    load,
    local,
    parameters,
    reduce_workgroup,
    rint,
    store,
    strided,
    threads,
    when,
)
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.gpu.rowwise import row_scalars


def rope(name: str, profile: Profile, rows: int | None, width: int, amplitude: float) -> tirx.PrimFunc:
    """(inverse frequencies fp32 [width / 2], out fp32 [n, width]; position, n): cosines, then sines, of n positions, times `amplitude`.

    Rotary position embedding, Su et al. 2021, in the half-split arrangement.
    """
    half, count = width // 2, profile.row_threads

    def body() -> None:
        (frequencies, out), (position, *rest) = parameters(["position", *row_scalars(rows)], frequencies="float32", out="float32")
        n = i32(rows) if rows is not None else rest[0]
        with threads((-(-half // count), n), (count,)) as ((part, row), (thread,)):
            column = let("column", part * i32(count) + thread)
            with when(column < i32(half)):
                cosine, sine = _cosine_and_sine(let("angle", T.Cast("float32", position + row) * load(frequencies, column)))
                store(out, row * i32(width) + column, cosine * f32(amplitude))
                store(out, row * i32(width) + i32(half) + column, sine * f32(amplitude))

    return build(name, body)


# Sums to pi / 2. The first two are exact products with any number of quarters; none needs more than the seven digits that TVM prints.
_HALF_PI = (1.5, 0.0703125, 4.837512e-4, 7.558521e-08)


def _cosine_and_sine(angle: Expr) -> tuple[Expr, Expr]:
    """To fp32's precision for angles up to 30,000: drivers promise far less, and nothing beyond pi.

    Cody-Waite reduction by pi / 2 in parts, then polynomials on [-pi / 4, pi / 4] (coefficients of Cephes' sinf and cosf).
    """
    quarters = let("quarters", rint(angle * f32(0.6366197723675814)))
    r = angle
    for part in _HALF_PI:
        r = let("reduced", r - quarters * f32(part))
    z = let("square", r * r)
    sine = let("sine", ((f32(-1.9515295891e-4) * z + f32(8.3321608736e-3)) * z + f32(-1.6666654611e-1)) * z * r + r)
    poly = (f32(2.443315711809948e-5) * z + f32(-1.388731625493765e-3)) * z + f32(4.166664568298827e-2)
    cosine = let("cosine", poly * z * z - f32(0.5) * z + f32(1.0))
    quadrant = let("quadrant", T.Cast("int32", quarters) & i32(3))
    odd = (quadrant & i32(1)) == i32(1)
    a, b = T.Select(odd, sine, cosine), T.Select(odd, cosine, sine)
    negative_cosine = T.Or(quadrant == i32(1), quadrant == i32(2))
    return T.Select(negative_cosine, f32(0.0) - a, a), T.Select(quadrant >= i32(2), f32(0.0) - b, b)


@dataclass(frozen=True)
class Rotation:
    """Norm and rotary embedding of one head's query or key."""

    shape: AttentionShape
    qkv: Buffer
    norm: Buffer | None
    rope: Buffer
    key: bool

    def inverse_rms(self, row: Expr, head: Expr, memory: Buffer, thread: Expr, count: int) -> Expr | None:
        """Computed by all `count` threads of the workgroup together; None where the model has no such norm."""
        if self.norm is None:
            return None
        s = self.shape
        width = s.head_dim if s.qk_norm == "head" else (s.kv_heads if self.key else s.heads) * s.head_dim
        start = self._start(row, head if s.qk_norm == "head" else i32(0))
        acc = local("squares", 1)
        store(acc, 0, f32(0.0))
        for place in strided("at", thread, count, width):
            with place as at:
                value = let("value", load(self.qkv, start + at))
                store(acc, 0, load(acc, 0) + value * value)
        total = reduce_workgroup(memory, thread, count, load(acc, 0), add)
        return let("inverse_rms", f32(1.0) / T.sqrt(total / f32(float(width)) + f32(s.eps)))

    def _start(self, row: Expr, head: Expr) -> Expr:
        s = self.shape
        return let("start", row * i32(s.qkv_width) + i32(s.heads * s.head_dim if self.key else 0) + head * i32(s.head_dim))

    def element(self, row: Expr, head: Expr, d: Expr, inverse: Expr | None) -> Expr:
        """Element d of the head, normed and rotated."""
        s = self.shape
        half = s.rotary // 2
        start = self._start(row, head)
        norms = head * i32(s.head_dim) if s.qk_norm == "vector" else i32(0)

        def plain(at: Expr) -> Expr:
            value = load(self.qkv, start + at)
            return value if self.norm is None else value * inverse * load(self.norm, norms + at)

        first = let("first_half", d < i32(half)) if half else None
        partner = let("partner", T.Select(first, d + i32(half), T.Select(d < i32(s.rotary), d - i32(half), d)))
        angle = let("angle_at", row * i32(s.rotary) + T.min(T.min(d, partner), i32(half - 1)))
        cosine, sine = load(self.rope, angle), load(self.rope, angle + i32(half))
        own = let("own", plain(d))
        rotated = own * cosine + T.Select(first, f32(-1.0), f32(1.0)) * plain(partner) * sine
        return let("element", rotated if s.rotary == s.head_dim else T.Select(d < i32(s.rotary), rotated, own))
