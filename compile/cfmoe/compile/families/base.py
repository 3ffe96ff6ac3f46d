"""What a family provides, and checked access to its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.compile.rope import KINDS, Rope
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

    def number(self, field: str, default: float | None = None, *, low: float = -1e9, high: float = 1e9) -> float:
        """A number in [low, high], which may be null where there is a default."""
        value = self.config.get(field)
        return self._bounded(field, default if value is None else value, low, high)

    def _bounded(self, field: str, value: Any, low: float, high: float) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(field, f"is {value!r}, but must be a number from {low:g} to {high:g}")
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

    def rope(self, theta: float = 10000.0) -> Rope:
        """The rotary embedding, from either place that transformers has put its parameters; `theta` is the family's default base."""
        parameters = self.config.get("rope_parameters") or {}
        scaling = self.config.get("rope_scaling") or parameters
        for field, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
            if not isinstance(value, dict):
                raise self.fail(field, f"is {value!r}, but must be an object or null")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in KINDS:
            raise self.fail("rope_scaling", f"has type {kind!r}; supported are {', '.join(map(repr, KINDS))}")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.fail("rope_scaling", f"has partial_rotary_factor {scaling['partial_rotary_factor']!r}; supported is 1.0")
        base = parameters.get("rope_theta", self.config.get("rope_theta"))
        base = self._bounded("rope_theta", theta if base is None else base, 1.001, 1e12)
        if kind == "default":
            return Rope(base)
        context = self.integer("max_position_embeddings", 2048)

        def read(name: str, default: float | None, low: float, high: float) -> float:
            value = scaling.get(name)
            return self._bounded(f"rope_scaling.{name}", default if value is None else value, low, high)

        original = int(read("original_max_position_embeddings", self.number("original_max_position_embeddings", context), 1, 1 << 24))
        factor = read("factor", context / original if kind == "yarn" else None, 1.0, 1e6)
        if kind == "linear":
            return Rope(base, kind, factor)
        if kind == "llama3":
            low, high = read("low_freq_factor", None, 1e-6, 1e6), read("high_freq_factor", None, 1e-6, 1e6)
            if not low < high:
                raise self.fail("rope_scaling.low_freq_factor", f"is {low:g}, but must be below high_freq_factor = {high:g}")
            return Rope(base, kind, factor, original, low, high)
        truncate = scaling.get("truncate", True)
        if not isinstance(truncate, bool):
            raise self.fail("rope_scaling.truncate", f"is {truncate!r}, but must be true or false")
        amplitude = scaling.get("attention_factor")
        return Rope(
            base,
            kind,
            factor,
            original,
            beta_fast=read("beta_fast", 32.0, 1e-6, 1e6),
            beta_slow=read("beta_slow", 1.0, 1e-6, 1e6),
            truncate=truncate,
            attention_factor=None if amplitude is None else read("attention_factor", None, 1e-6, 1e6),
            mscale=read("mscale", 0.0, 0.0, 1e3),
            mscale_all_dim=read("mscale_all_dim", 0.0, 0.0, 1e3),
        )

    def require(self, field: str, allowed: Any, default: Any) -> None:
        """Refuses a value that would change the computation in a way that the decoder does not know."""
        value = self.config.get(field, default)
        if value != allowed:
            raise self.fail(field, f"is {value!r}; supported is {allowed!r}")

    def common(self, *, rope_theta: float = 10000.0, rms_norm_eps: float = 1e-6, head_dim: int | None = None) -> dict[str, Any]:
        """The fields that all families share, as DecoderConfig arguments.

        `rope_theta` and `rms_norm_eps` are the family's defaults, `head_dim` what follows from other fields.
        """
        heads = self.integer("num_attention_heads", high=1 << 12)
        hidden = self.width("hidden_size")
        kv_heads = self.integer("num_key_value_heads", heads, high=1 << 12)
        if head_dim is None:
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
            "rms_norm_eps": self.number("rms_norm_eps", rms_norm_eps, low=0.0, high=1.0),
            "rope": self.rope(rope_theta),
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

    def experts(self, ffn_field: str, *, count_field: str | None = None, renormalise: bool | None = None) -> dict[str, Any]:
        """The routed experts, as DecoderConfig arguments.

        Their number goes by either name that transformers has given it, unless `count_field` says which. `renormalise` is for families
        that leave no choice.
        """
        if count_field is None:
            count_field = "num_experts" if "num_experts" in self.config else "num_local_experts"
        count = self.integer(count_field, high=4096)
        top_k = self.integer("num_experts_per_tok", high=64)
        if top_k > count:
            raise self.fail("num_experts_per_tok", f"is {top_k}, more than {count_field} = {count}")
        return {
            "num_experts": count,
            "top_k": top_k,
            "expert_ffn_size": self.width(ffn_field),
            "router_renormalise": self.boolean("norm_topk_prob", False) if renormalise is None else renormalise,
        }

    def window(self, default: int = 0) -> int:
        """How many tokens back attention sees, by sliding_window, `default` where that is absent; 0, as null does, means all."""
        return 0 if self.config.get("sliding_window", default) is None else self.integer("sliding_window", default, low=0)

    def windows_by_layer(self, layers: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
        """`window` for the layers that layer_types calls sliding, or where it is absent those for which `slides` holds; 0 for others."""
        kinds = self.config.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise self.fail("layer_types", f"must list 'sliding_attention' or 'full_attention' for each of {layers} layers")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

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
    attention: str = "model.layers.{l}.self_attn."
    router: str = "model.layers.{l}.mlp.gate"
    expert: str = "model.layers.{l}.mlp.experts.{e}.{part}.weight"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    fused_gate_up: str = "model.layers.{l}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{l}.mlp.experts.down_proj"
    fused_transposed: bool = False  # [experts, inputs, outputs], gate and up alternating in the outputs: gpt-oss
    dense: str = "model.layers.{l}.mlp.{part}_proj.weight"
    shared: str = "model.layers.{l}.mlp.shared_expert.{part}_proj.weight"
    shared_gate: str = "model.layers.{l}.mlp.shared_expert_gate.weight"


@dataclass(frozen=True)
class Family:
    """An entry of the table. `configure` raises CFMoEError where the configuration asks for what the decoder lacks."""

    model_type: str
    configure: Callable[[ConfigReader], DecoderConfig]
    names: WeightNames = WeightNames()
    packed_weights: str | None = None  # the one quant_method of quantization_config that is read
