"""What a family provides, and checked access to its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.errors import CFMoEError


class ConfigReader:
    """Reads config.json with types and bounds; every fault names the file and the field."""

    def __init__(self, config: dict[str, Any], path: str) -> None:
        self.config = config
        self.path = path

    def fail(self, field: str, reason: str) -> CFMoEError:
        return CFMoEError(f"{self.path}: {field} {reason}")

    def integer(self, field: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self.config.get(field, default)
        if value is None and default is not None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(field, f"is {value!r}, but must be an integer from {low} to {high}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.config.get(field, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, but must be a number")
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, but must be true or false")
        return value

    def token_ids(self, field: str) -> tuple[int, ...]:
        value = self.config.get(field)
        values = value if isinstance(value, list) else [] if value is None else [value]
        vocab = self.integer("vocab_size")
        if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab for v in values):
            raise self.fail(field, f"is {value!r}, but must be null, a token id below vocab_size = {vocab} or a list of them")
        return tuple(values)

    def rope_theta(self) -> float:
        """The base of the rotary embedding, in either place that transformers has put it. Scaled variants are refused."""
        parameters = self.config.get("rope_parameters") or {}
        scaling = self.config.get("rope_scaling") or parameters
        if not isinstance(scaling, dict) or not isinstance(parameters, dict):
            raise self.fail("rope_scaling", f"is {scaling!r}, but must be an object or null")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise self.fail("rope_scaling", f"has type {kind!r}; supported is 'default'")
        theta = parameters.get("rope_theta", self.config.get("rope_theta", 10000.0))
        if not isinstance(theta, (int, float)) or not theta > 1:
            raise self.fail("rope_theta", f"is {theta!r}, but must be a number above 1")
        return float(theta)

    def require(self, field: str, allowed: Any, default: Any) -> None:
        """Refuses a value that would change the computation in a way that the decoder does not know."""
        value = self.config.get(field, default)
        if value != allowed:
            raise self.fail(field, f"is {value!r}; supported is {allowed!r}")

    def common(self) -> dict[str, Any]:
        """The fields that all families share, as DecoderConfig arguments."""
        heads = self.integer("num_attention_heads", high=1 << 12)
        hidden = self.width("hidden_size")
        kv_heads = self.integer("num_key_value_heads", heads, high=1 << 12)
        head_dim = self.width("head_dim", hidden // heads, high=1024)
        if heads % kv_heads:
            raise self.fail("num_attention_heads", f"is {heads}, but must be a multiple of num_key_value_heads = {kv_heads}")
        self.require("hidden_act", "silu", "silu")
        return {
            "num_layers": self.integer("num_hidden_layers", high=1024),
            "hidden_size": hidden,
            "vocab_size": self.integer("vocab_size"),
            "context_size": self.integer("max_position_embeddings", 2048),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": self.number("rms_norm_eps", 1e-6),
            "rope_theta": self.rope_theta(),
            "tie_embeddings": self.boolean("tie_word_embeddings", False),
            "bos_token_id": next(iter(self.token_ids("bos_token_id")), None),
            "eos_token_ids": self.token_ids("eos_token_id"),
        }

    def width(self, field: str, default: int | None = None, *, high: int = 1 << 24) -> int:
        """A dimension that kernels read in groups of 32."""
        value = self.integer(field, default, low=32, high=high)
        if value % 32:
            raise self.fail(field, f"is {value}, but must be a multiple of 32")
        return value

    def experts(self, ffn_field: str) -> dict[str, Any]:
        """The routed experts, as DecoderConfig arguments; their number goes by either name that transformers has given it."""
        count_field = "num_experts" if "num_experts" in self.config else "num_local_experts"
        count = self.integer(count_field, high=4096)
        top_k = self.integer("num_experts_per_tok", high=64)
        if top_k > count:
            raise self.fail("num_experts_per_tok", f"is {top_k}, more than {count_field} = {count}")
        return {
            "num_experts": count,
            "top_k": top_k,
            "expert_ffn_size": self.width(ffn_field),
            "router_renormalise": self.boolean("norm_topk_prob", False),
        }

    def moe_layers(self, layers: int) -> tuple[int, ...]:
        """Qwen's rule: every decoder_sparse_step-th layer that is not in mlp_only_layers."""
        step = self.integer("decoder_sparse_step", 1, high=1024)
        only = self.config.get("mlp_only_layers") or []
        if not isinstance(only, list):
            raise self.fail("mlp_only_layers", f"is {only!r}, but must be a list of layer numbers")
        chosen = tuple(i for i in range(layers) if i not in only and (i + 1) % step == 0)
        if not chosen:
            raise self.fail("mlp_only_layers", "leaves no layer with experts: this is not a Mixture-of-Experts model")
        return chosen


@dataclass(frozen=True)
class WeightNames:
    """Tensor names of a checkpoint; `{l}` is the layer, `{e}` the expert. `fused` names are 3-D stacks over the experts."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    input_norm: str = "model.layers.{l}.input_layernorm.weight"
    post_norm: str = "model.layers.{l}.post_attention_layernorm.weight"
    q: str = "model.layers.{l}.self_attn.q_proj"
    k: str = "model.layers.{l}.self_attn.k_proj"
    v: str = "model.layers.{l}.self_attn.v_proj"
    o: str = "model.layers.{l}.self_attn.o_proj"
    q_norm: str = "model.layers.{l}.self_attn.q_norm.weight"
    k_norm: str = "model.layers.{l}.self_attn.k_norm.weight"
    router: str = "model.layers.{l}.mlp.gate.weight"
    expert: str = "model.layers.{l}.mlp.experts.{e}.{part}_proj.weight"
    fused_gate_up: str = "model.layers.{l}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{l}.mlp.experts.down_proj"
    dense: str = "model.layers.{l}.mlp.{part}_proj.weight"
    shared: str = "model.layers.{l}.mlp.shared_expert.{part}_proj.weight"
    shared_gate: str = "model.layers.{l}.mlp.shared_expert_gate.weight"


@dataclass(frozen=True)
class Family:
    """An entry of the table. `configure` raises CFMoEError where the configuration asks for what the decoder lacks."""

    model_type: str
    configure: Callable[[ConfigReader], DecoderConfig]
    names: WeightNames = WeightNames()
