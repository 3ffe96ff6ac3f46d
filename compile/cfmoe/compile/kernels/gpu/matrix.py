"""Products of activations with packed weights: GEMV for one row, GEMM for rows that share weights.

Weights are addressed in 32-bit words. A thread owns four neighbouring outputs of a tile, so that eight threads read a row of the tile in
one coalesced access.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr, f32
from cfmoe.compile.kernels.gpu.builder import (
    barrier,
    bits_to_float,
    dot4,
    extern,
    halves,
    i32,
    kept,
    lane,
    let,
    load,
    local,
    loop,
    shared,
    store,
    when,
)
from cfmoe.compile.kernels.gpu.profile import Profile
from cfmoe.compile.kernels.matmul import Format

QUAD = 4  # outputs of a thread
SLICES = 4  # threads of the GEMV that share outputs
_AT_ONCE = 8  # inputs whose weights a thread of the GEMM has under way, where they are floats
GEMM_ROWS = 32  # rows of a workgroup of the GEMM
GEMM_THREADS = (TILE // QUAD, GEMM_ROWS // QUAD)
_NIBBLES = 0x0F0F0F0F
_ONES = 0x01010101
_SIGNS = -0x7F7F7F80


def slab_dtype(fmt: Format) -> str:
    """The element type that kernels see weights in: always 32 bits wide."""
    return "float32" if fmt.name == "f32" else "int32"


def bias_at(fmt: Format, slab: Buffer, base: Expr, element: Expr) -> Expr:
    """Element `element` of a section's biases, which start at word `base`, as fp32."""
    if fmt.name == "f32":
        return load(slab, base + element)
    if fmt.quantised:
        return bits_to_float(load(slab, base + element))
    pair = let("bias_pair", halves(load(slab, base + (element >> i32(1)))))
    return T.Select((element & i32(1)) == i32(0), lane(pair, 0), lane(pair, 1))


def bias_words(fmt: Format, elements: int) -> int:
    return elements // 2 if fmt.name == "f16" else elements


@dataclass(frozen=True)
class Gemv:
    """One row times one tile of `streams` matrices whose blocks alternate, by 32 × rows threads.

    Four threads share four outputs. Of quantised weights each takes a block of its own, so that all it reads are wide loads and what it
    does once per block serves 32 inputs; of floats each takes a fourth of the inputs of one block.
    """

    profile: Profile
    fmt: Format
    inputs: int
    tiles: int  # of the matrix, each a workgroup
    streams: int = 1

    @property
    def blocks(self) -> int:
        return self.inputs // GROUP

    @property
    def _blocks_at_once(self) -> int:
        """Blocks of a row of threads."""
        return SLICES if self.fmt.quantised else 1

    @property
    def rows(self) -> int:
        """Rows of threads: more where there are few tiles, and none that would be idle in every step."""
        most = self.profile.thread_rows
        while most > self.profile.min_thread_rows and most * TILE * self.tiles > self.profile.threads_at_once:
            most //= 2
        units = -(-self.blocks // self._blocks_at_once)
        return -(-units // -(-units // most))

    @property
    def threads(self) -> tuple[int, int]:
        return TILE, self.rows

    def emit(self, slab: Buffer, base: Expr, activation: Buffer, row: Expr, x: Expr, y: Expr) -> list[Expr]:
        """Sums of output x of the tile, one per stream, valid in the threads with y = 0.

        `base` is the word at which the tile starts, `row` the element of `activation` at which its row starts.
        """
        if self.profile.shuffles:
            slot, quad = let("slot", x & i32(3)), let("quad", x >> i32(2))
        else:
            slot, quad = let("slot", x >> i32(3)), let("quad", x & i32(7))
        acc = [local(f"acc_{s}", QUAD) for s in range(self.streams)]
        for buffer in acc:
            for o in range(QUAD):
                store(buffer, o, f32(0.0))
        at_once = self._blocks_at_once
        step = self.rows * at_once
        own = let("own_block", y * i32(SLICES) + slot) if at_once > 1 else y
        block = self._quantised_block if self.fmt.quantised else self._float_block
        whole, rest = divmod(self.blocks, step)
        if whole:
            with loop("step", whole) as at:
                block(acc, slab, base, activation, row, let("block", at * i32(step) + own), None, slot, quad)
        if rest:
            with when(y < i32(-(-rest // at_once))):
                number = let("block", own + i32(whole * step))
                valid = number < i32(self.blocks) if rest % at_once else None
                block(acc, slab, base, activation, row, number, valid, slot, quad)
        return self._sum(acc, x, y, slot, quad)

    def _quantised_block(
        self,
        acc: Sequence[Buffer],
        slab: Buffer,
        base: Expr,
        activation: Buffer,
        row: Expr,
        block: Expr,
        valid: Expr | None,  # whether there is such a block; None: always
        _slot: Expr,
        quad: Expr,
    ) -> None:
        fmt = self.fmt
        place = let("safe_block", T.min(block, i32(self.blocks - 1))) if valid is not None else block
        # All loads first, so that they are under way together.
        weights = []
        for s in range(self.streams):
            at = let("at", base + (place * i32(self.streams) + i32(s)) * i32(fmt.words32))
            codes = [let("codes", load(slab, at + i32(w * TILE) + quad * i32(QUAD), 4)) for w in range(GROUP // fmt.codes_per_word)]
            weights.append((codes, _scale_words(fmt, slab, at, quad)))
        group = let("group", row + place * i32(10))
        pairs = [let("inputs", load(activation, group + i32(2 * i), 2)) for i in range(5)]
        words = [lane(pair, i) for pair in pairs for i in range(2)]
        inputs, scale = words[:8], bits_to_float(words[8])
        if valid is not None:
            scale = kept("scale", T.Select(valid, scale, f32(0.0)))
        start = kept("start", _lower_sum(inputs) * i32(-fmt.zero)) if fmt.codes_per_word == 8 else i32(0)
        for sums, (codes, scale_words) in zip(acc, weights, strict=True):
            for o in range(QUAD):
                total = _block_sum(fmt, [lane(vector, o) for vector in codes], inputs, start)
                weight_scale = lane(halves(lane(scale_words, o // 2)), o % 2)
                store(sums, o, load(sums, o) + T.Cast("float32", total) * (weight_scale * scale))

    def _float_block(
        self,
        acc: Sequence[Buffer],
        slab: Buffer,
        base: Expr,
        activation: Buffer,
        row: Expr,
        block: Expr,
        _valid: Expr | None,
        slot: Expr,
        quad: Expr,
    ) -> None:
        x = let("inputs_at", row + block * i32(GROUP) + slot * i32(8))
        values = [let("inputs", load(activation, x + i32(4 * i), 4)) for i in range(2)]
        for stream, sums in enumerate(acc):
            at = base + (block * i32(self.streams) + i32(stream)) * i32(self.fmt.words32)
            for k in range(8):
                weights = _float_weights(self.fmt, slab, at, slot * i32(8) + i32(k), quad)
                for o in range(QUAD):
                    store(sums, o, load(sums, o) + weights[o] * lane(values[k // 4], k % 4))

    def _sum(self, acc: Sequence[Buffer], x: Expr, y: Expr, slot: Expr, quad: Expr) -> list[Expr]:
        """Adds slices and thread rows in a fixed order."""
        parts = 1 if self.profile.shuffles else SLICES
        memory = [shared(f"partial_{s}", parts * self.rows * TILE) for s in range(self.streams)]
        for buffer, partial in zip(acc, memory, strict=True):
            if parts == 1:
                _gather_quad(buffer, slot)
                store(partial, y * i32(TILE) + x, load(buffer, 0))
                continue
            place = let("place", (y * i32(parts) + slot) * i32(TILE) + quad * i32(QUAD))
            for o in range(QUAD):
                store(partial, place + i32(o), load(buffer, o))
        barrier()
        if parts > 1:
            for partial in memory:
                column = let("column", y * i32(SLICES * TILE) + x)
                total = load(partial, column)
                for s in range(1, SLICES):
                    total = total + load(partial, column + i32(s * TILE))
                store(partial, column, total)
            if self.rows > 1:
                barrier()
        sums = []
        for partial in memory:
            total = load(partial, x)
            for r in range(1, self.rows):
                total = total + load(partial, x + i32(r * parts * TILE))
            sums.append(let("sum", total))
        return sums


def _gather_quad(sums: Buffer, slot: Expr) -> None:
    """Four neighbouring threads hold partial sums of the same four outputs: leaves output `slot`'s sum in sums[0]."""
    values = [load(sums, o) for o in range(QUAD)]
    odd, high = let("odd", (slot & i32(1)) == i32(1)), let("high", slot >= i32(2))
    # Stored before they are used again, since TIR would move a bound value into a branch, where a shuffle's other threads are missing.
    kept_pair = [let("kept_sum", T.Select(odd, values[i + 1], values[i])) for i in (0, 2)]
    given = [let("given_sum", T.Select(odd, values[i], values[i + 1])) for i in (0, 2)]
    pair = [let("pair_sum", kept_pair[i] + extern("float32", "shuffle_xor", given[i], i32(1))) for i in range(2)]
    for i in range(2):
        store(sums, i, pair[i])
    low, up = load(sums, 0), load(sums, 1)
    last = let("last_sum", T.Select(high, up, low) + extern("float32", "shuffle_xor", T.Select(high, low, up), i32(2)))
    store(sums, 0, last)


def _lower_sum(inputs: Sequence[Expr]) -> Expr:
    """Sum of the inputs that the lower codes of q4's words meet."""
    total = dot4(inputs[0], i32(_ONES))
    for word in inputs[2::2]:
        total = total + dot4(word, i32(_ONES))
    return total


def _block_sum(fmt: Format, words: Sequence[Expr], inputs: Sequence[Expr], start: Expr) -> Expr:
    """Exact sum over a block's 32 inputs of code minus zero point times input; `start` is -8 times `_lower_sum` for q4."""
    if fmt.codes_per_word != 8:
        total = dot4(words[0] ^ i32(_SIGNS), inputs[0])
        for word, value in zip(words[1:], inputs[1:], strict=True):
            total = total + dot4(word ^ i32(_SIGNS), value)
        return total
    # The upper codes stay where they are: with its top bit turned, such a byte is sixteen times code - 8.
    lower, upper = start, None
    for w, word in enumerate(words):
        lower = lower + dot4(word & i32(_NIBBLES), inputs[2 * w])
        part = dot4((word & i32(-_NIBBLES - 1)) ^ i32(_SIGNS), inputs[2 * w + 1])
        upper = part if upper is None else upper + part
    return lower + (upper >> i32(4))


def _float_weights(fmt: Format, slab: Buffer, block: Expr, k: Expr, quad: Expr) -> list[Expr]:
    """Weights of input k of a block for the four outputs of a thread."""
    if fmt.name == "f32":
        vector = let("weights", load(slab, block + k * i32(TILE) + quad * i32(QUAD), 4))
        return [lane(vector, o) for o in range(QUAD)]
    words = let("words", load(slab, block + k * i32(TILE // 2) + quad * i32(QUAD // 2), 2))
    pairs = [let("weights", halves(lane(words, i))) for i in range(2)]
    return [lane(pairs[o // 2], o % 2) for o in range(QUAD)]


def _scale_words(fmt: Format, slab: Buffer, block: Expr, quad: Expr) -> Expr:
    return let("scale_words", load(slab, block + i32(GROUP // fmt.codes_per_word * TILE) + quad * i32(QUAD // 2), 2))


def _scales(fmt: Format, slab: Buffer, block: Expr, quad: Expr) -> list[Expr]:
    words = _scale_words(fmt, slab, block, quad)
    pairs = [let("scales", halves(lane(words, i))) for i in range(2)]
    return [lane(pairs[o // 2], o % 2) for o in range(QUAD)]


class _Staging:
    """Brings one block's inputs of a GEMM's rows into shared memory, by way of registers."""

    def __init__(
        self, gemm: Gemm, memory: tuple[Buffer, Buffer], activation: Buffer, row_start: Callable[[Expr], Expr], thread: Expr
    ) -> None:
        starts, self.staged = memory
        self.activation = activation
        self.width = 10 if gemm.fmt.quantised else GROUP  # elements of a row of a block
        self.lanes = 1 if gemm.fmt.quantised else 4  # of a load
        with when(thread < i32(GEMM_ROWS)):
            store(starts, thread, row_start(thread))
        barrier()
        count, per_row = GEMM_THREADS[0] * GEMM_THREADS[1], self.width // self.lanes
        self.items = GEMM_ROWS * per_row // count  # of a thread
        self.held = local("held", self.items * self.lanes, gemm.fmt.activation_dtype)
        self.sources, self.targets = local("sources", self.items, "int32"), local("targets", self.items, "int32")
        for i in range(self.items):
            item = thread + i32(i * count)
            row = let("row", T.truncdiv(item, i32(per_row)))
            column = let("column", (item - row * i32(per_row)) * i32(self.lanes))
            store(self.sources, i, load(starts, row) + column)
            store(self.targets, i, row * i32(gemm.stride) + column)

    def read(self, block: Expr) -> None:
        values = [
            let("value", load(self.activation, load(self.sources, i) + block * i32(self.width), self.lanes)) for i in range(self.items)
        ]
        for i, value in enumerate(values):
            for j in range(self.lanes):
                store(self.held, i * self.lanes + j, lane(value, j) if self.lanes > 1 else value)

    def write(self) -> None:
        for i in range(self.items):
            for j in range(self.lanes):
                store(self.staged, load(self.targets, i) + i32(j), load(self.held, i * self.lanes + j))


@dataclass(frozen=True)
class Gemm:
    """32 rows times one tile of `streams` matrices whose blocks alternate, by 8 × 8 threads of four rows and four outputs each."""

    fmt: Format
    inputs: int
    streams: int = 1

    @property
    def stride(self) -> int:
        """Elements of a row of one block of activations in shared memory: odd, so that rows fall into different banks."""
        return 11 if self.fmt.quantised else GROUP + 1

    def memory(self) -> tuple[Buffer, Buffer]:
        """Shared memory for `emit`; OpenCL C has it declared outside of any condition."""
        return shared("row_starts", GEMM_ROWS, "int32"), shared("staged", GEMM_ROWS * self.stride, self.fmt.activation_dtype)

    def emit(
        self,
        memory: tuple[Buffer, Buffer],
        slab: Buffer,
        base: Expr,
        activation: Buffer,
        row_start: Callable[[Expr], Expr],  # row of the workgroup -> element of `activation` at which it starts
        x: Expr,
        y: Expr,
    ) -> list[Buffer]:
        """Sums per stream: element 4 * r + o is row 4 * y + r, output 4 * x + o of the tile."""
        fmt = self.fmt
        acc = [local(f"acc_{s}", QUAD * QUAD) for s in range(self.streams)]
        for buffer in acc:
            for i in range(QUAD * QUAD):
                store(buffer, i, f32(0.0))
        sums = local("sums", QUAD * QUAD, "int32") if fmt.quantised else None
        staging = _Staging(self, memory, activation, row_start, let("thread_number", y * i32(GEMM_THREADS[0]) + x))
        staged, last = memory[1], self.inputs // GROUP - 1
        staging.read(i32(0))
        with loop("block", self.inputs // GROUP) as block:
            firsts = [let("first", base + (block * i32(self.streams) + i32(stream)) * i32(fmt.words32)) for stream in range(self.streams)]
            staging.write()
            barrier()
            # The next block's activations are under way while this one is multiplied.
            staging.read(T.min(block + i32(1), i32(last)))
            for stream, first in enumerate(firsts):
                if sums is not None:
                    self._quantised(acc[stream], sums, self._codes(slab, first, x), staged, y)
                else:
                    self._floats(acc[stream], slab, first, staged, x, y)
            barrier()
        return acc

    def _codes(self, slab: Buffer, block: Expr, x: Expr) -> tuple[list[Expr], list[Expr]]:
        """(codes of a block's words, scales) for the four outputs of a thread."""
        words = GROUP // self.fmt.codes_per_word
        codes = [let("codes", load(slab, block + i32(w * TILE) + x * i32(QUAD), 4)) for w in range(words)]
        return codes, _scales(self.fmt, slab, block, x)

    def _quantised(self, acc: Buffer, sums: Buffer, weights: tuple[list[Expr], list[Expr]], staged: Buffer, y: Expr) -> None:
        fmt = self.fmt
        rows = [let("row_at", (y * i32(QUAD) + i32(r)) * i32(self.stride)) for r in range(QUAD)]
        four_bit = fmt.codes_per_word == 8
        for r in range(QUAD):
            start = let("start", load(staged, rows[r] + i32(9)) * i32(-fmt.zero)) if four_bit else i32(0)
            for o in range(QUAD):
                store(sums, QUAD * r + o, start)
        codes, scales = weights
        for w, word in enumerate(codes):
            per = 2 if four_bit else 1
            inputs = [[let("inputs", load(staged, rows[r] + i32(w * per + i))) for i in range(per)] for r in range(QUAD)]
            for o in range(QUAD):
                code = lane(word, o)
                parts = [code & i32(_NIBBLES), (code >> i32(4)) & i32(_NIBBLES)] if four_bit else [code ^ i32(_SIGNS)]
                parts = [let("part_codes", p) for p in parts]
                for r in range(QUAD):
                    total = load(sums, QUAD * r + o)
                    for p, v in zip(parts, inputs[r], strict=True):
                        total = total + dot4(p, v)
                    store(sums, QUAD * r + o, total)
        for r in range(QUAD):
            scale = let("scale", bits_to_float(load(staged, rows[r] + i32(8))))
            for o in range(QUAD):
                at = QUAD * r + o
                store(acc, at, load(acc, at) + T.Cast("float32", load(sums, at)) * (scales[o] * scale))

    def _floats(self, acc: Buffer, slab: Buffer, block: Expr, staged: Buffer, x: Expr, y: Expr) -> None:
        first = let("row_at", y * i32(QUAD * self.stride))
        with loop("part_k", GROUP // _AT_ONCE) as part:
            places = [let("k", part * i32(_AT_ONCE) + i32(u)) for u in range(_AT_ONCE)]
            weights = [_float_weights(self.fmt, slab, block, k, x) for k in places]
            for k, outputs in zip(places, weights, strict=True):
                for r in range(QUAD):
                    value = let("value", load(staged, first + i32(r * self.stride) + k))
                    for o in range(QUAD):
                        at = QUAD * r + o
                        store(acc, at, load(acc, at) + outputs[o] * value)
