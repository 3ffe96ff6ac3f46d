"""What the parametric decoder needs to know about a model, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes count elements. Layers in `moe_layers` have experts; the others a dense feed-forward of `dense_ffn_size`."""

    family: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    context_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_ffn_size: int
    moe_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    router_score: str = "softmax"  # or sigmoid
    router_renormalise: bool = True
    router_scale: float = 1.0
    qk_norm: str = "none"  # head: over each head; vector: over all heads at once
    qkv_bias: bool = False
    dense_ffn_size: int = 0
    shared_ffn_size: int = 0  # 0: no shared experts
    shared_gate: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


PRESETS: dict[str, dict[str, str]] = {
    "mixed": {"expert": "q4", "attention": "q8", "dense": "q8", "embedding": "q8", "head": "q8"},
    "q4": {"expert": "q4", "attention": "q4", "dense": "q4", "embedding": "q8", "head": "q8"},
    "q8": dict.fromkeys(("expert", "attention", "dense", "embedding", "head"), "q8"),
    "f16": dict.fromkeys(("expert", "attention", "dense", "embedding", "head"), "f16"),
    "f32": dict.fromkeys(("expert", "attention", "dense", "embedding", "head"), "f32"),
}


@dataclass(frozen=True)
class Quantisation:
    """A storage format per tensor class; routers and norms are always f32."""

    preset: str
    classes: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def named(preset: str) -> Quantisation:
        return Quantisation(preset, PRESETS[preset])

    def __getitem__(self, tensor_class: str) -> str:
        return self.classes[tensor_class]

    @property
    def kv_dtype(self) -> str:
        return "float32" if self.preset == "f32" else "float16"
