"""What the parametric decoder needs to know about a model, whatever family it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from cfmoe.compile.rope import Rope


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are projected down and up again. Widths are elements.

    The decoder expands them for every head, so that the caches hold plain keys of `rope + nope` and values of `value` elements.
    """

    kv_rank: int
    q_rank: int  # 0: queries are projected at once
    rope: int
    nope: int
    value: int


@dataclass(frozen=True)
class ClampedSwiglu:
    """(min(max(up, -limit), limit) + 1) * g * sigmoid(alpha * g), g = min(gate, limit): gpt-oss."""

    alpha: float
    limit: float


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
    rope: Rope
    tie_embeddings: bool
    router_score: str = "softmax"  # or sigmoid
    router_renormalise: bool = True
    router_scale: float = 1.0
    router_bias: bool = False
    router_groups: int = 1  # experts are chosen from the `router_top_groups` groups with the highest single score
    router_top_groups: int = 1
    expert_bias: bool = False
    expert_swiglu: ClampedSwiglu | None = None  # None: silu(gate) * up
    qk_norm: str = "none"  # head: over each head; vector: over all heads at once
    qkv_bias: bool = False
    o_bias: bool = False
    softmax_scale: float = 0.0  # 0: one over the root of head_dim
    sinks: bool = False  # a learned score per head that takes part in the softmax and adds nothing
    windows: tuple[int, ...] = ()  # per layer: how many tokens back attention sees, 0 for all; empty: all everywhere
    latent: LatentAttention | None = None
    dense_ffn_size: int = 0
    shared_ffn_size: int = 0  # 0: no shared experts
    shared_gate: bool = False
    # Folded into the weights at conversion; the residual one of the experts is part of router_scale.
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def value_dim(self) -> int:
        """Width of a head's values; head_dim is that of its queries and keys."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many of a head's elements are rotated: the first ones."""
        return self.latent.rope if self.latent else self.head_dim

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + self.num_kv_heads) * self.head_dim + self.num_kv_heads * self.value_dim

    @property
    def attention_scale(self) -> float:
        return self.softmax_scale or self.head_dim**-0.5

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def attention_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's attention projections."""
        out = (self.num_heads * self.value_dim, self.hidden_size)
        if self.latent is None:
            return [(self.hidden_size, self.qkv_width), out]
        m, heads = self.latent, self.num_heads
        q_inputs = m.q_rank or self.hidden_size
        down = [(self.hidden_size, m.q_rank)] if m.q_rank else []
        kv = [(self.hidden_size, m.kv_rank), (self.hidden_size, m.rope), (m.kv_rank, heads * (m.nope + m.value))]
        return [*down, (q_inputs, heads * self.head_dim), *kv, out]


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
