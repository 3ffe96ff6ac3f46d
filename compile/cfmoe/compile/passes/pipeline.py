"""The phases from the abstract decoder to straight-line kernel calls over planned memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm import relax

from cfmoe.compile.passes.fuse_linear_residual import FuseLinearResidual
from cfmoe.compile.passes.fuse_norm_quantise import FuseNormQuantise


def phases(
    lowering: tvm.transform.Pass, first: Sequence[tvm.transform.Pass] = (), last: Sequence[tvm.transform.Pass] = ()
) -> list[tuple[str, Sequence[tvm.transform.Pass]]]:
    """(name, passes) in order; `lowering` replaces abstract operations by kernels of a target, which may want passes `first` and `last`."""
    return [
        *([("prepare", first)] if first else []),
        ("fuse_norm_quantise", [FuseNormQuantise()]),
        ("fuse_linear_residual", [FuseLinearResidual()]),
        *([("fuse_for_target", last)] if last else []),
        ("lower_to_kernels", [lowering]),
        ("legalise", [relax.transform.LegalizeOps(), relax.transform.DeadCodeElimination(["prefill", "decode", "head"])]),
        (
            "plan_memory",
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.CanonicalizeBindings(),
            ],
        ),
    ]


def bound_symbols(mod: tvm.IRModule, bounds: dict[str, int]) -> tvm.IRModule:
    """Tells the memory planner how large the symbolic dimensions can become."""
    for var, function in mod.functions_items():
        if isinstance(function, relax.Function):
            for attribute in ("tir_var_upper_bound", "tirx_var_upper_bound"):
                function = function.with_attr(attribute, bounds)
            mod[var] = function
    return mod


def run(
    mod: tvm.IRModule,
    lowering: tvm.transform.Pass,
    bounds: dict[str, int],
    dump_ir: Path | None = None,
    first: Sequence[tvm.transform.Pass] = (),
    last: Sequence[tvm.transform.Pass] = (),
) -> tvm.IRModule:
    """Runs every phase; with `dump_ir` writes `NN_phase.py` after each."""
    mod = bound_symbols(mod, bounds)

    def dump(number: int, name: str) -> None:
        if dump_ir is not None:
            dump_ir.mkdir(parents=True, exist_ok=True)
            (dump_ir / f"{number:02}_{name}.py").write_text(mod.script())

    dump(0, "decoder")
    for number, (name, passes) in enumerate(phases(lowering, first, last), 1):
        mod = tvm.transform.Sequential(list(passes))(mod)
        dump(number, name)
    return mod
