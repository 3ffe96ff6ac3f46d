"""What a model takes in memory and what a token touches of it: the sizes that planning needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cfmoe.errors import CFMoEError
from cfmoe.trace import Trace

if TYPE_CHECKING:
    from cfmoe.artifact import Artifact
    from cfmoe.runtime import Engine

DEFAULT_CONTEXT = 4096  # tokens, as the engine's


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes. `fixed_bytes` are weights, KV cache and workspace; `slot_bytes` one expert record with its padding.

    estimated: worked out from the checkpoint's configuration instead of read from an engine.
    """

    name: str
    layers: int  # MoE layers
    experts: int  # of one layer
    top_k: int
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    record_bytes: int
    slot_bytes: int
    estimated: bool

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.experts

    @property
    def fixed_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def active_expert_bytes(self) -> int:
        """Bytes of experts that one decoded token multiplies with."""
        return self.layers * self.top_k * self.record_bytes

    @property
    def active_bytes(self) -> int:
        """Bytes that one decoded token reads from memory; of the embedding one row alone, which the weights' sum overstates."""
        return self.weights_bytes + self.active_expert_bytes

    def budget(self, slots: int) -> int:
        """The memory budget that gives `slots` expert slots."""
        return self.fixed_bytes + slots * self.slot_bytes

    def slots(self, budget: int) -> int:
        """The expert slots that a memory budget of `budget` bytes gives. Raises CFMoEError where it is too small to run."""
        least = self.budget(self.top_k)
        if budget < least:
            raise CFMoEError(f"a memory budget of {budget} bytes is below the smallest that works, {least} bytes: give more")
        return min(self.total, (budget - self.fixed_bytes) // self.slot_bytes)

    def check(self, trace: Trace, where: Path | str) -> None:
        """Raises CFMoEError where the trace is of a model of another shape."""
        own, its = (self.layers, self.experts, self.top_k), (trace.layers, trace.experts, trace.top_k)
        if own != its:
            raise CFMoEError(
                f"{where} is of a model with {its[0]} MoE layers, {its[1]} experts and top-{its[2]}, {self.name} has "
                f"{own[0]}, {own[1]} and top-{own[2]}: record a trace of this model"
            )


def of_engine(artifact: Artifact, engine: Engine) -> Footprint:
    """The exact sizes, as an opened engine has them."""
    memory, experts = engine.memory, artifact.index.experts
    return Footprint(
        artifact.manifest.model.name,
        experts.layers,
        experts.experts,
        artifact.manifest.model.top_k,
        memory.weights_bytes,
        memory.kv_bytes,
        memory.workspace_bytes,
        experts.record_bytes,
        experts.record_stride,
        estimated=False,
    )


def of_artifact(artifact: Artifact, context_size: int | None = None) -> Footprint:
    """The sizes of an artifact that need not run here: weights and experts as its files have them, KV cache and workspace estimated."""
    manifest, experts = artifact.manifest, artifact.index.experts
    model = manifest.model
    context = min(model.context_size, context_size or DEFAULT_CONTEXT)
    return Footprint(
        model.name,
        experts.layers,
        experts.experts,
        model.top_k,
        manifest.files["weights.bin"].size,
        kv_bytes(model.num_layers, model.num_kv_heads, model.head_dim + artifact.value_dim(), context, manifest.kv_dtype),
        workspace_bytes(manifest.prefill_chunk, model.hidden_size),
        experts.record_bytes,
        experts.record_stride,
        estimated=True,
    )


def kv_bytes(layers: int, heads: int, width: int, context: int, dtype: str) -> int:
    """Keys and values of `context` tokens; `width` is what a head's key and value have together."""
    return layers * heads * width * context * (4 if dtype == "float32" else 2)


def workspace_bytes(chunk: int, hidden: int) -> int:
    """Activations of a chunk, logits and lists: about eight times chunk × hidden floats in the decoders that there are."""
    return 8 * chunk * hidden * 4
