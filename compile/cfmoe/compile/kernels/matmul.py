"""One tile of a weight matrix against a few activation rows: the inner loop of every projection.

Weight and activation layouts are those of docs/artifact-format.md. Sums over the inputs run in the same order for any number of rows, so
a row's result does not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import GROUP, TILE, Buffer, Expr, f32, fma, i64, let, load, local, loop, shuffle, splat, store
from cfmoe.compile.kernels.simd import Simd


@dataclass(frozen=True)
class Format:
    """How weights of one class are stored. `words` is the size of a block in units of `dtype`."""

    name: str
    dtype: str
    words: int
    words32: int  # the same in 32-bit words
    codes_per_word: int = 0
    zero: int = 0

    @property
    def quantised(self) -> bool:
        return self.codes_per_word > 0

    @property
    def activation_dtype(self) -> str:
        return "int32" if self.quantised else "float32"

    def activation_width(self, inputs: int) -> int:
        """Elements of one activation row of `inputs` values."""
        return inputs // GROUP * 10 if self.quantised else inputs


FORMATS = {
    "q4": Format("q4", "int32", 4 * TILE + TILE // 2, 4 * TILE + TILE // 2, 8, 8),
    "q8": Format("q8", "int32", 8 * TILE + TILE // 2, 8 * TILE + TILE // 2, 4, 128),
    "f16": Format("f16", "float16", GROUP * TILE, GROUP * TILE // 2),
    "f32": Format("f32", "float32", GROUP * TILE, GROUP * TILE),
}


def row_blocks(simd: Simd, fmt: Format) -> tuple[int, ...]:
    """How many rows share one pass over a tile, the most first: as many as 32 vector registers hold."""
    return (8, 4, 2, 1) if simd.matrix and fmt.quantised else (4, 1)


def padded(outputs: int) -> int:
    return -(-outputs // TILE) * TILE


def packed_size(fmt: Format, inputs: int, outputs: int) -> int:
    """Elements of `fmt.dtype` that a matrix of `inputs` × `outputs` occupies."""
    return padded(outputs) // TILE * (inputs // GROUP) * fmt.words


def _nibbles(packed: Expr, lanes: int) -> list[Expr]:
    """The lower and the upper four bits of every byte. ARM shifts bytes, which leaves nothing to mask."""
    upper = T.reinterpret(f"uint8x{lanes * 4}", packed) >> splat(tirx.IntImm("uint8", 4), lanes * 4)
    return [let(packed & splat(tirx.IntImm("int32", 0x0F0F0F0F), lanes)), let(T.reinterpret(f"int32x{lanes}", upper))]


def _quantised_block(
    simd: Simd, fmt: Format, weights: Buffer, block: Expr, activation: Buffer, rows: Sequence[Expr], group: Expr, acc: Sequence[Buffer]
) -> None:
    lanes = simd.lanes
    vector = f"int32x{lanes}"
    signed = simd.dot == "sdot"
    code_words = GROUP // fmt.codes_per_word
    at = let(group * i64(10))
    scales = [let(T.reinterpret("float32", activation[row, at + i64(8)])) for row in rows]
    # Signed instructions take code - zero directly for 8-bit codes; otherwise the zero point leaves with the sum of the activations.
    shift = 0 if signed and fmt.zero == 128 else -fmt.zero
    starts = [let(activation[row, at + i64(9)] * tirx.IntImm("int32", shift)) for row in rows]

    def emit(first: Expr) -> None:
        sums = [splat(start, lanes) for start in starts]
        for word in range(code_words):
            packed = let(load(weights, block + i64(word * TILE) + first, lanes=lanes))
            if fmt.codes_per_word == 8:
                halves = _nibbles(packed, lanes)
            elif signed:
                halves = [let(packed ^ splat(tirx.IntImm("int32", -0x7F7F7F80), lanes))]
            else:
                halves = [packed]
            for half, codes in enumerate(halves):
                for r, row in enumerate(rows):
                    x = activation[row, at + i64(word * len(halves) + half)]
                    sums[r] = simd.dot4_signed(sums[r], codes, x) if signed else simd.dot4(sums[r], codes, x)
        half_words = load(weights, block + i64(code_words * TILE) + T.floordiv(first, i64(2)), lanes=lanes // 2)
        weight_scale = let(T.Cast(f"float32x{lanes}", T.reinterpret(f"float16x{lanes}", half_words)))
        for r in range(len(rows)):
            old = load(acc[r], first, lanes=lanes)
            total = T.Cast(f"float32x{lanes}", T.Cast(vector, sums[r]))
            store(acc[r], fma(total, weight_scale * splat(scales[r], lanes), old, lanes), first, lanes=lanes)

    if simd.unrolls:
        for part in range(TILE // lanes):
            emit(i64(part * lanes))
    else:
        with loop(TILE // lanes) as part:
            emit(let(part * i64(lanes)))


def _matrix_block(
    simd: Simd, fmt: Format, weights: Buffer, block: Expr, activation: Buffer, rows: Sequence[Expr], group: Expr, acc: Sequence[Buffer]
) -> None:
    """`acc` has a buffer for two rows each: output after output, in each the one row and the other."""
    code_words = GROUP // fmt.codes_per_word
    at = let(group * i64(10))
    eights, scales, starts = [], [], []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        halves = [[let(load(activation, row, at + i64(word), lanes=4)) for row in pair] for word in (0, 4)]
        eights.append([let(shuffle(both, lanes)) for both in halves for lanes in ((0, 1, 4, 5), (2, 3, 6, 7))])
        facts = [let(load(activation, row, at + i64(8), lanes=2)) for row in pair]
        scales.append(let(T.reinterpret("float32x4", shuffle(facts, (0, 2, 0, 2)))))
        starts.append(let(shuffle(facts, (1, 3, 1, 3)) * splat(tirx.IntImm("int32", -fmt.zero), 4)))
    with loop(TILE // 4) as part:
        first = let(part * i64(4))
        sums = [[start, start] for start in starts]
        for eight in range(4):
            word = block + i64(eight * (code_words // 4) * TILE) + first
            low = let(load(weights, word, lanes=4))
            if fmt.codes_per_word == 8:
                low, high = _nibbles(low, 4)
            else:
                high = let(load(weights, word + i64(TILE), lanes=4))
            for two, lanes in enumerate(((0, 4, 1, 5), (2, 6, 3, 7))):
                codes = let(shuffle([low, high], lanes))
                for number, words in enumerate(eights):
                    sums[number][two] = simd.matrix8(sums[number][two], codes, words[eight])
        half_words = load(weights, block + i64(code_words * TILE) + T.floordiv(first, i64(2)), lanes=2)
        weight_scale = let(T.Cast("float32x4", T.reinterpret("float16x4", half_words)))
        for two, lanes in enumerate(((0, 0, 1, 1), (2, 2, 3, 3))):
            scale_of_two = let(shuffle([weight_scale], lanes))
            place = let(first * i64(2) + i64(two * 4))
            for number, scale in enumerate(scales):
                total = T.Cast("float32x4", sums[number][two])
                store(acc[number], fma(total, scale_of_two * scale, load(acc[number], place, lanes=4), 4), place, lanes=4)


def _rows_of(pairs: Sequence[Buffer]) -> list[Buffer]:
    """What `_matrix_block` has summed, a buffer for each row."""
    rows = [local(TILE) for _ in range(2 * len(pairs))]
    with loop(TILE // 4) as part:
        for number, pair in enumerate(pairs):
            both = [let(load(pair, part * i64(8) + i64(two * 4), lanes=4)) for two in range(2)]
            for row in range(2):
                store(rows[2 * number + row], shuffle(both, (row, 2 + row, 4 + row, 6 + row)), part * i64(4), lanes=4)
    return rows


def _float_block(
    simd: Simd, weights: Buffer, block: Expr, activation: Buffer, rows: Sequence[Expr], group: Expr, acc: Sequence[Buffer]
) -> None:
    lanes = simd.lanes
    with loop(GROUP) as k:
        for part in range(TILE // lanes):
            w = let(T.Cast(f"float32x{lanes}", load(weights, block + k * i64(TILE) + i64(part * lanes), lanes=lanes)))
            for r, row in enumerate(rows):
                x = activation[row, group * i64(GROUP) + k]
                old = load(acc[r], i64(part * lanes), lanes=lanes)
                store(acc[r], fma(w, splat(x, lanes), old, lanes), i64(part * lanes), lanes=lanes)


def accumulate(
    simd: Simd,
    fmt: Format,
    weights: Buffer,  # 1-D, fmt.dtype
    base: Expr,  # of the tile's first block, in elements of fmt.dtype
    activation: Buffer,  # (n, fmt.activation_width(inputs))
    rows: Sequence[Expr],  # of `activation`
    inputs: int,
    streams: int = 1,  # matrices whose blocks alternate
) -> list[list[Buffer]]:
    """Emits acc[stream][row] = activation[row] @ tile; returns the accumulators, 32 fp32 values each."""
    lanes = simd.lanes
    matrix = simd.matrix and fmt.quantised and len(rows) > 1
    buffers, width = (len(rows) // 2, 2 * TILE) if matrix else (len(rows), TILE)
    acc = [[local(width) for _ in range(buffers)] for _ in range(streams)]
    for per_stream in acc:
        for buffer in per_stream:
            for part in range(width // lanes):
                store(buffer, splat(f32(0.0), lanes), i64(part * lanes), lanes=lanes)
    with loop(inputs // GROUP) as group:
        for stream in range(streams):
            block = let(base + (group * i64(streams) + i64(stream)) * i64(fmt.words))
            if matrix:
                _matrix_block(simd, fmt, weights, block, activation, rows, group, acc[stream])
            elif fmt.quantised:
                _quantised_block(simd, fmt, weights, block, activation, rows, group, acc[stream])
            else:
                _float_block(simd, weights, block, activation, rows, group, acc[stream])
    return [_rows_of(pairs) for pairs in acc] if matrix else acc
