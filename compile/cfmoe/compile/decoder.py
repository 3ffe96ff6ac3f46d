"""The parametric decoder in relax.frontend.nn: what a Mixture-of-Experts transformer computes, as abstract operations.

Operations are calls of packed functions named `cfmoe.*` with their static attributes as trailing arguments. Passes fuse them and
`passes/lower_to_kernels.py` replaces them by kernels of a target; `cfmoe.route` and `cfmoe.experts` stay: they are the runtime's own steps.
"""

from __future__ import annotations

from tvm import relax, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm.relax.frontend.nn.core import wrap_nested

from cfmoe.compile.decoder_config import DecoderConfig, Quantisation
from cfmoe.compile.kernels.expert import scratch_width
from cfmoe.compile.kernels.matmul import FORMATS, packed_size, padded

LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever config.json says of the other norms


def _extern(name: str, args: list[object], shape: list[object], dtype: str = "float32") -> Tensor:
    return op.extern(f"cfmoe.{name}", args, out=Tensor.placeholder(shape, dtype))


def _host_step(name: str, args: list[Tensor], numbers: list[int], outs: list[tuple[list[object], str]]) -> tuple[Tensor, ...]:
    """A step of the runtime with several results, which nn.op.extern cannot express."""
    inputs = relax.Tuple([*(arg._expr for arg in args), *(relax.prim_value(number) for number in numbers)])
    types = [Tensor.placeholder(shape, dtype)._expr.ty for shape, dtype in outs]
    return wrap_nested(relax.op.call_dps_packed(f"cfmoe.{name}", inputs, types), name)


class Linear(nn.Module):
    """A packed projection. `quantised` inputs are what `activate` returns for the same format."""

    def __init__(self, format_name: str, inputs: int, outputs: int, *, bias: bool = False) -> None:
        self.format = format_name
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter((packed_size(FORMATS[format_name], inputs, outputs),), FORMATS[format_name].dtype)
        if bias:
            self.bias = nn.Parameter((outputs,), "float32")
        self.has_bias = bias

    def forward(self, x: Tensor) -> Tensor:  # (n, activation width) -> (n, outputs)
        extra = [self.bias] if self.has_bias else []
        attributes = [self.format, self.inputs, self.outputs, int(self.has_bias)]
        return _extern("linear", [x, self.weight, *extra, *attributes], [x.shape[0], self.outputs])


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        self.width, self.eps = width, eps
        self.weight = nn.Parameter((width,), "float32")

    def forward(self, x: Tensor) -> Tensor:  # (n, width)
        return _extern("rms_norm", [x, self.weight, self.eps], [x.shape[0], self.width])


def activate(x: Tensor, format_name: str, width: int) -> Tensor:
    """What a projection of `format_name` weights reads: int8 groups, or `x` itself."""
    fmt = FORMATS[format_name]
    if not fmt.quantised:
        return x
    return _extern("quantise", [x], [x.shape[0], fmt.activation_width(width)], "int32")


class FeedForward(nn.Module):
    """A dense or shared gated feed-forward layer."""

    def __init__(self, format_name: str, hidden: int, ffn: int) -> None:
        self.format, self.ffn = format_name, ffn
        self.gate_up = Linear(format_name, hidden, 2 * ffn)
        self.down = Linear(format_name, ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate_up(x)
        h = _extern("silu_mul", [h], [h.shape[0], self.ffn])
        return self.down(activate(h, self.format, self.ffn))


class LatentProjections(nn.Module):
    """Queries, keys and values of multi-head latent attention, expanded to one head of keys and values per head of queries."""

    def __init__(self, c: DecoderConfig, format_name: str) -> None:
        assert c.latent is not None
        self.config, self.format, self.m = c, format_name, c.latent
        m = c.latent
        if m.q_rank:
            self.q_down = Linear(format_name, c.hidden_size, m.q_rank)
            self.q_norm = RMSNorm(m.q_rank, LATENT_NORM_EPS)
        self.q = Linear(format_name, m.q_rank or c.hidden_size, c.num_heads * c.head_dim)
        self.kv_down = Linear(format_name, c.hidden_size, m.kv_rank)
        self.k_rope = Linear(format_name, c.hidden_size, m.rope)
        self.kv_norm = RMSNorm(m.kv_rank, LATENT_NORM_EPS)
        self.kv = Linear(format_name, m.kv_rank, c.num_heads * (m.nope + m.value))

    def forward(self, x: Tensor) -> Tensor:  # (n, activation width) -> (n, qkv width)
        c, m, fmt = self.config, self.m, self.format
        q = self.q(activate(self.q_norm(self.q_down(x)), fmt, m.q_rank) if m.q_rank else x)
        kv = self.kv(activate(self.kv_norm(self.kv_down(x)), fmt, m.kv_rank))
        args = [q, self.k_rope(x), kv, c.num_heads, m.rope, m.nope, m.value]
        return _extern("latent_heads", args, [x.shape[0], c.qkv_width])


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, quantisation: Quantisation, index: int, gathers: bool) -> None:
        c, q = config, quantisation
        self.config, self.quantisation, self.gathers = c, q, gathers
        self.input_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.index = index
        if c.latent is None:
            self.qkv = Linear(q["attention"], c.hidden_size, c.qkv_width, bias=c.qkv_bias)
        else:
            self.latent = LatentProjections(c, q["attention"])
        self.o = Linear(q["attention"], c.num_heads * c.value_dim, c.hidden_size, bias=c.o_bias)
        if c.sinks:
            self.sinks = nn.Parameter((c.num_heads,), "float32")
        if c.qk_norm != "none":
            heads = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            self.q_norm = nn.Parameter((heads[0] * c.head_dim,), "float32")
            self.k_norm = nn.Parameter((heads[1] * c.head_dim,), "float32")
        self.moe = c.moe_layers.index(index) if index in c.moe_layers else None
        if self.moe is None:
            self.dense = FeedForward(q["dense"], c.hidden_size, c.dense_ffn_size)
            return
        self.router = Linear("f32", c.hidden_size, padded(c.num_experts), bias=c.router_bias)
        if c.shared_ffn_size:
            self.shared = FeedForward(q["dense"], c.hidden_size, c.shared_ffn_size)
            if c.shared_gate:
                self.shared_gate = Linear("f32", c.hidden_size, 32)

    def forward(self, x: Tensor, rope: Tensor, k_cache: Tensor, v_cache: Tensor, position: object) -> Tensor:  # x: (n, hidden)
        x = op.add(x, self._attention(self.input_norm(x), rope, k_cache, v_cache, position))
        normed = self.post_norm(x)
        if self.moe is None:
            return op.add(x, self.dense(activate(normed, self.quantisation["dense"], self.config.hidden_size)))
        return self._experts(x, normed, self.moe)

    def _attention(self, x: Tensor, rope: Tensor, k_cache: Tensor, v_cache: Tensor, position: object) -> Tensor:
        c, fmt = self.config, self.quantisation["attention"]
        x = activate(x, fmt, c.hidden_size)
        qkv = self.qkv(x) if c.latent is None else self.latent(x)
        norms = [] if c.qk_norm == "none" else [self.q_norm, self.k_norm]
        sinks = [self.sinks] if c.sinks else []
        shape = [c.num_heads, c.num_kv_heads, c.head_dim, c.value_dim, c.rotary_dim]
        attributes = [*shape, c.attention_scale, c.window(self.index), int(c.sinks), c.qk_norm, c.rms_norm_eps]
        width = c.num_heads * c.value_dim
        args = [qkv, *norms, *sinks, rope, k_cache, v_cache, position, *attributes]
        return self.o(activate(_extern("attention", args, [qkv.shape[0], width]), fmt, width))

    def _experts(self, x: Tensor, normed: Tensor, moe: int) -> Tensor:
        c = self.config
        n = x.shape[0]
        logits = self.router(normed)
        chosen: list[object] = [n, c.top_k]
        ids, weights = _host_step("route", [logits], [moe, c.router_groups, c.router_top_groups], [(chosen, "int32"), (chosen, "float32")])
        if c.shared_ffn_size:
            shared = self.shared(activate(normed, self.quantisation["dense"], c.hidden_size))
            x = _extern("gated_add", [shared, self.shared_gate(normed), x], [n, c.hidden_size]) if c.shared_gate else op.add(x, shared)
        fmt = self.quantisation["expert"]
        # Decode computes the experts of one token side by side, prefill one expert at a time over up to n tokens, or all of them at once.
        scratch_rows = n * c.top_k if n == 1 or self.gathers else tirx.max(n, c.top_k)
        scratch: list[object] = [scratch_rows, scratch_width(fmt, c.expert_ffn_size)]
        rows, _scratch = _host_step(
            "experts",
            [activate(normed, fmt, c.hidden_size), ids],
            [moe],
            [([n * c.top_k, c.hidden_size], "float32"), (scratch, FORMATS[fmt].activation_dtype)],
        )
        return _extern("combine", [x, rows, weights, c.top_k], [n, c.hidden_size])


class Decoder(nn.Module):
    """Methods `prefill`, `decode` and `head` become the three programs of plan.json.

    `gathers`: whether prefill computes all experts of a layer at once, each on the tokens gathered for it, as GPUs do.
    """

    def __init__(self, config: DecoderConfig, quantisation: Quantisation, gathers: bool = False) -> None:
        self.config, self.quantisation = config, quantisation
        embedding = FORMATS[quantisation["embedding"]]
        self.embedding = nn.Parameter((packed_size(embedding, config.hidden_size, config.vocab_size),), embedding.dtype)
        self.inverse_frequencies = nn.Parameter((config.rotary_dim // 2,), "float32")
        self.layers = nn.ModuleList([Layer(config, quantisation, i, gathers) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            head = FORMATS[quantisation["head"]]
            self.lm_head = nn.Parameter((packed_size(head, config.hidden_size, config.vocab_size),), head.dtype)

    def _run(self, tokens: Tensor, position: object, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        c = self.config
        attributes = [self.quantisation["embedding"], c.vocab_size, c.hidden_size]
        x = _extern("embedding", [tokens, self.embedding, *attributes], [tokens.shape[0], c.hidden_size])
        rope = _extern("rope", [self.inverse_frequencies, position, c.rotary_dim, c.rope.amplitude], [tokens.shape[0], c.rotary_dim])
        for layer, k_cache, v_cache in zip(self.layers, k_caches, v_caches, strict=True):
            x = layer(x, rope, k_cache, v_cache, position)
        return x

    def prefill(self, tokens: Tensor, position: object, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        return self._run(tokens, position, k_caches, v_caches)

    def decode(self, tokens: Tensor, position: object, k_caches: list[Tensor], v_caches: list[Tensor]) -> Tensor:
        return self._run(tokens, position, k_caches, v_caches)

    def head(self, hidden: Tensor) -> Tensor:  # (1, hidden) -> (1, vocab)
        c = self.config
        fmt = self.quantisation["embedding" if c.tie_embeddings else "head"]
        weight = self.embedding if c.tie_embeddings else self.lm_head
        x = activate(self.final_norm(hidden), fmt, c.hidden_size)
        return _extern("linear", [x, weight, fmt, c.hidden_size, c.vocab_size, 0], [1, c.vocab_size])

    def export(self) -> tuple[object, list[tuple[str, nn.Parameter]]]:
        """The IRModule with the three functions, and the named parameters in the order of their arguments."""
        c = self.config
        dtype = self.quantisation.kv_dtype
        keys = [nn.spec.Tensor([c.num_kv_heads, "blocks", c.head_dim, 16], dtype) for _ in range(c.num_layers)]
        values = [nn.spec.Tensor([c.num_kv_heads, "context", c.value_dim], dtype) for _ in range(c.num_layers)]

        def program(rows: int | str) -> dict[str, object]:
            return {
                "tokens": nn.spec.Tensor([rows], "int32"),
                "position": int,
                "k_caches": keys,
                "v_caches": values,
                "$": {"param_mode": "plain", "effect_mode": "none"},
            }

        spec = {
            "prefill": program("n"),
            "decode": program(1),
            "head": {"hidden": nn.spec.Tensor([1, c.hidden_size], "float32"), "$": {"param_mode": "plain", "effect_mode": "none"}},
        }
        return self.export_tvm(spec=spec)
