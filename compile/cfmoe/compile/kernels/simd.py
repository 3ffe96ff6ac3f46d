"""Integer dot products: what each CPU family offers, with identical sums everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from cfmoe.compile.kernels.builder import Expr, intrinsic, let, splat


def _int(value: int) -> Expr:
    return tirx.IntImm("int32", value)


@dataclass(frozen=True)
class Simd:
    """Vector unit of a CPU target. `dot` names the instruction behind `dot4`: vnni, madd, sdot, usdot or none.

    `fused`: whether the CPU multiplies and adds fp32 numbers in one instruction. `matrix`: whether it has that of `matrix8`.
    """

    lanes: int
    dot: str
    fused: bool = True
    matrix: bool = False

    @property
    def unrolls(self) -> bool:
        """Whether a tile's vectors are written out. Short vectors are looped over: written out they take minutes to compile."""
        return self.dot == "vnni"

    def _vector(self, dtype: str, factor: int = 1) -> str:
        return f"{dtype}x{self.lanes * factor}"

    def dot4(
        self,
        acc: Expr,  # int32 x lanes
        codes: Expr,  # int32 x lanes: four unsigned codes a lane
        word: Expr,  # int32: four int8 activations
    ) -> Expr:
        """acc[lane] + sum over b of codes[lane].byte[b] * word.byte[b], exact."""
        if self.dot == "vnni":
            return let(
                intrinsic(
                    self._vector("int32"),
                    f"llvm.x86.avx512.vpdpbusd.{self.lanes * 32}",
                    acc,
                    T.reinterpret(self._vector("int8", 4), codes),
                    T.reinterpret(self._vector("int8", 4), splat(word, self.lanes)),
                )
            )
        if self.dot == "usdot":
            return self._neon("usdot", acc, codes, splat(word, self.lanes))
        if self.dot == "madd":
            return self._dot4_madd(acc, codes, word)
        return self._dot4_generic(acc, codes, word)

    def _dot4_madd(self, acc: Expr, codes: Expr, word: Expr) -> Expr:
        # pmaddubsw saturates with 8-bit codes; widening to 16 bits first keeps the sum exact.
        def madd(a: Expr, b: Expr) -> Expr:
            return intrinsic(
                self._vector("int32"),
                "llvm.x86.avx2.pmadd.wd",
                T.reinterpret(self._vector("int16", 2), a),
                T.reinterpret(self._vector("int16", 2), b),
            )

        low = splat(_int(0x00FF00FF), self.lanes)
        eight = splat(tirx.IntImm("int16", 8), self.lanes * 2)
        pairs = let(T.reinterpret(self._vector("int16", 2), splat(word, self.lanes)))
        even = let(T.reinterpret(self._vector("int32"), (pairs << eight) >> eight))
        odd = let(T.reinterpret(self._vector("int32"), pairs >> eight))
        acc = let(acc + madd(codes & low, even))
        return let(acc + madd((codes >> splat(_int(8), self.lanes)) & low, odd))

    def _dot4_generic(self, acc: Expr, codes: Expr, word: Expr) -> Expr:
        for byte in range(4):
            x = let((word << _int(24 - 8 * byte)) >> _int(24))
            code = codes >> splat(_int(8 * byte), self.lanes)
            acc = let(acc + (code & splat(_int(255), self.lanes)) * splat(x, self.lanes))
        return acc

    def dot4_signed(self, acc: Expr, codes: Expr, word: Expr) -> Expr:
        """The same with signed bytes in `codes`; only where `dot` is sdot."""
        assert self.dot == "sdot"
        return self._neon("sdot", acc, codes, splat(word, self.lanes))

    def matrix8(
        self,
        acc: Expr,  # int32x4: sums of (output 0, row 0), (0, 1), (1, 0), (1, 1)
        codes: Expr,  # int32x4: eight unsigned codes of output 0, then of output 1
        words: Expr,  # int32x4: eight int8 activations of row 0, then of row 1
    ) -> Expr:
        """acc + the products of 2 outputs and 2 rows, 8 deep, exact; only where `matrix`."""
        assert self.matrix
        return self._neon("usmmla", acc, codes, words)

    @staticmethod
    def _neon(name: str, acc: Expr, codes: Expr, words: Expr) -> Expr:
        arguments = (T.reinterpret("int8x16", vector) for vector in (codes, words))
        return let(intrinsic("int32x4", f"llvm.aarch64.neon.{name}.v4i32.v16i8", acc, *arguments))
