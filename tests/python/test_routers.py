"""MoE layers are found in every family, and what is recorded is what the model itself decides, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_models
from cfmoe.errors import CFMoEError
from cfmoe.tune.routers import MoELayer, RouterRecorder, find_moe_layers
from moe_models import EXPERTS, FAMILIES, TOP_K, random_tokens, tiny_config, tiny_model

SIGMOID = {"deepseek_v3", "glm4_moe", "llama4_text"}

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def spying(layers: list[MoELayer]) -> Iterator[list[Tensor]]:
    """The ids that the experts' own code gets, read below all hooks."""
    seen: list[Tensor] = []
    originals = [module.forward for layer in layers for module in layer.experts]

    def spy(original: Callable[..., Any], hidden: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append(next(value for value in (*rest, *named.values()) if value.dtype == torch.int64).clone())
        return original(hidden, *rest, **named)

    modules = [module for layer in layers for module in layer.experts]
    for module, original in zip(modules, originals, strict=True):
        module.forward = lambda hidden, *rest, _original=original, **named: spy(_original, hidden, *rest, **named)
    try:
        yield seen
    finally:
        for module in modules:
            del module.forward


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found(family: str) -> None:
    model = tiny_model(family)
    layers = find_moe_layers(model)
    expected = [i for i in range(moe_models.LAYERS) if not (family == "qwen3_moe" and i == 1)]
    if "first_k_dense_replace" in FAMILIES[family]:
        expected = expected[1:]
    assert [int(layer.name.split(".")[2]) for layer in layers] == expected
    for index, layer in enumerate(layers):
        assert layer.index == index
        assert model.get_submodule(layer.name) is layer.block
        assert model.get_submodule(layer.router_name) is layer.router
        assert [model.get_submodule(name) for name in layer.expert_names] == list(layer.experts)
        assert (layer.num_experts, layer.top_k) == (EXPERTS, TOP_K)
        assert layer.score == ("sigmoid" if family in SIGMOID else "softmax")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded(family: str) -> None:
    """The logits are those that the model gives out itself, the ids those that its experts get."""
    model = tiny_model(family)
    tokens = random_tokens()
    layers = find_moe_layers(model)
    with torch.no_grad(), spying([] if family == "llama4_text" else layers) as seen, RouterRecorder(layers) as recorder:
        output = model(tokens, output_router_logits=True)
        logits, ids = recorder.logits, recorder.ids
    assert len(output.router_logits) == len(logits) == len(ids) == len(layers)
    for own, recorded in zip(output.router_logits, logits, strict=True):
        assert recorded.shape == (tokens.numel(), EXPERTS)
        assert torch.equal(own.reshape(-1, EXPERTS), recorded)
    if family == "llama4_text":  # its experts get all tokens, multiplied by zero where they were not chosen
        seen = [recorded.topk(TOP_K).indices for recorded in logits]
    for own, recorded in zip(seen, ids, strict=True):
        assert recorded.shape == (tokens.numel(), TOP_K)
        assert torch.equal(own, recorded)
    assert len({tuple(row) for row in ids[0].tolist()}) > 3  # the routers do disagree between tokens


def test_ids_are_those_of_the_group_limited_choice() -> None:
    """In DeepSeek's families the best logits are not always the ones chosen; what counts is what was."""
    model = tiny_model("deepseek_v2", num_experts_per_tok=3)
    with torch.no_grad(), RouterRecorder(model) as recorder:
        model(random_tokens(4, 16))
    best = [logits.topk(3).indices.sort(-1).values for logits in recorder.logits]
    assert any(not torch.equal(ids.sort(-1).values, other) for ids, other in zip(recorder.ids, best, strict=True))


def test_router_that_gives_probabilities() -> None:
    """Gemma 4 hands out the softmax: the logarithms of what it gives are logits of the same distribution."""
    model = tiny_model(
        "gemma4_text",
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=TOP_K,
        head_dim=8,
        global_head_dim=8,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
    )
    layers = find_moe_layers(model)
    assert [(layer.num_experts, layer.top_k, layer.score) for layer in layers] == [(EXPERTS, TOP_K, "softmax")] * moe_models.LAYERS
    with torch.no_grad(), RouterRecorder(layers) as recorder:
        output = model(random_tokens(), output_router_logits=True)
    for own, logits in zip(output.router_logits, recorder.logits, strict=True):
        torch.testing.assert_close(own, logits.softmax(-1))
        assert bool((logits < 0).any())


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(hidden)))


class ListBlock(nn.Module):
    """The layout before transformers 5: a linear gate, a list of experts, the choice made in the block."""

    def __init__(self, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, experts, bias=False)
        self.shared_expert_gate = nn.Linear(width, 1)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.gate(hidden)
        weights, chosen = logits.softmax(-1).topk(self.top_k, dim=-1)
        out = torch.sigmoid(self.shared_expert_gate(hidden)) * hidden
        for number, expert in enumerate(self.experts):
            weight = (weights * (chosen == number)).sum(-1, keepdim=True)
            out = out + weight * expert(hidden)
        return out


class ListModel(nn.Module):
    def __init__(self, width: int = 8, layers: int = EXPERTS) -> None:
        super().__init__()
        self.config = tiny_config("mixtral")
        self.embed = nn.Embedding(EXPERTS, width)  # as many rows and as many layers as experts: neither is a router or a list of experts
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv1d(1, EXPERTS, 1), ListBlock(width, EXPERTS, TOP_K)) for _ in range(layers))

    def forward(self, hidden: Tensor, checkpointing: bool = False) -> Tensor:
        for _, block in self.layers:
            hidden = hidden + (checkpoint(block, hidden, use_reentrant=False) if checkpointing else block(hidden))
        return hidden


def test_list_of_experts_with_a_linear_gate() -> None:
    torch.manual_seed(0)
    model = ListModel()
    layers = find_moe_layers(model)
    assert [layer.name for layer in layers] == [f"layers.{i}.1" for i in range(EXPERTS)]
    assert {(layer.router_name.split(".")[-1], layer.score, layer.top_k) for layer in layers} == {("gate", "softmax", TOP_K)}
    hidden = torch.randn(2, 5, 8)
    with RouterRecorder(layers) as recorder:
        model(hidden)
    expected = layers[0].router(hidden).reshape(-1, EXPERTS)
    assert torch.equal(recorder.logits[0], expected)
    assert torch.equal(recorder.ids[0], expected.topk(TOP_K).indices)


def test_models_without_moe_layers() -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(CFMoEError, match=r"LlamaForCausalLM has no MoE layer: no module has experts .* no such number.*give a MoE model"):
        find_moe_layers(AutoModelForCausalLM.from_config(tiny_config("llama")))
    with pytest.raises(CFMoEError, match=r"as many as config\.json says: 8"):
        find_moe_layers(tiny_model("qwen3_moe", mlp_only_layers=[0, 1, 2]))


def gradients(model: nn.Module, run: Callable[..., Any]) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Logits, ids and gradients of a loss that has a term of the logits; nothing is recorded in the backward pass."""
    tokens = random_tokens()
    model.zero_grad()
    with RouterRecorder(model) as recorder:
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        logits = recorder.logits
        (loss + sum((layer.float().softmax(-1) ** 2).sum() for layer in logits)).backward()
        assert all(one is other for one, other in zip(logits, recorder.logits, strict=True))
        ids = recorder.ids
    return [layer.detach() for layer in logits], ids, {name: parameter.grad for name, parameter in trained(model)}


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.grad is not None]


def assert_same(one: Any, other: Any) -> None:
    for left, right in zip(one[:2], other[:2], strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b)
    assert one[2].keys() == other[2].keys()
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], msg=name)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "granitemoe"])
def test_gradient_checkpointing_counts_once(family: str) -> None:
    model = tiny_model(family).train()
    plain = gradients(model, model)
    for layer in find_moe_layers(model):
        assert plain[2][f"{layer.router_name}.weight"].abs().sum() > 0
    model.gradient_checkpointing_enable()
    fired: list[int] = []
    handle = find_moe_layers(model)[0].router.register_forward_hook(lambda *_: fired.append(1))
    assert_same(plain, gradients(model, model))
    handle.remove()
    assert len(fired) == 2  # once more, in the recomputation


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny_model("qwen3_moe").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(CFMoEError, match=r'ran without gradients.*"use_reentrant": False'):
        gradients(model, model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_model(checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = ListModel(layers=2)
    hidden = torch.randn(2, 5, 8)

    def loss_and_routing(run: Callable[..., Tensor]) -> Any:
        model.zero_grad()
        with RouterRecorder(model) as recorder:
            loss = run(hidden, checkpointing).square().mean()
            logits, ids = recorder.logits, recorder.ids
            (loss + sum((layer.softmax(-1) ** 2).sum() for layer in logits)).backward()
        return [layer.detach() for layer in logits], ids, {name: parameter.grad for name, parameter in trained(model)}

    plain = loss_and_routing(model)
    torch._dynamo.reset()
    assert_same(plain, loss_and_routing(torch.compile(model, backend="aot_eager")))


def test_adapters_do_not_hide_the_layers() -> None:
    """peft wraps fused experts, and copies the routers that are to be trained: what the active copy says is recorded."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model("qwen3_moe")
    names = [(layer.name, layer.num_experts, layer.top_k, layer.score) for layer in find_moe_layers(model)]
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["mlp.gate"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    layers = find_moe_layers(adapted)
    assert [(layer.name.removeprefix("base_model.model."), *rest) for layer, (_, *rest) in zip(layers, names, strict=True)] == names
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    tokens = random_tokens()
    with RouterRecorder(layers) as recorder:
        output = adapted(tokens, output_router_logits=True)
        with adapted.disable_adapter():
            trained = recorder.logits
            adapted(tokens)
            base = recorder.logits
    for own, recorded in zip(output.router_logits, trained, strict=True):
        assert torch.equal(own.reshape(-1, EXPERTS), recorded)
    assert not torch.allclose(trained[0], base[0])


def test_each_pass_is_recorded_alone() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    with torch.no_grad(), RouterRecorder(layers) as recorder:
        assert recorder.logits == recorder.ids == []
        model(random_tokens(1, 4))
        model(random_tokens(1, 6))
        assert {logits.shape[0] for logits in recorder.logits} == {6}
        recorder.clear()
        assert recorder.logits == recorder.ids == []
        layers[1].block(torch.randn(1, 3, 16))
        with pytest.raises(CFMoEError, match=r"went past the router model\.layers\.0\.mlp\.gate; record a pass through the whole model"):
            _ = recorder.logits
    model(random_tokens(1, 5))
    recorder.clear()
    model(random_tokens(1, 5))
    assert recorder.logits == []  # after `with` nothing is recorded


def test_some_layers_only() -> None:
    model = tiny_model("mixtral")
    layers = find_moe_layers(model)
    with torch.no_grad(), RouterRecorder(layers) as every, RouterRecorder(layers[1:]) as some:
        model(random_tokens())
        for one, other in zip(every.logits[1:], some.logits, strict=True):
            assert torch.equal(one, other)


def test_classes_that_a_library_derives() -> None:
    """FSDP2 puts a class of its own in front of each module's."""
    model = tiny_model("deepseek_v3")
    expected = [(layer.name, layer.num_experts, layer.score) for layer in find_moe_layers(model)]
    for module in list(model.modules()):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {"__module__": "torch.distributed.fsdp"})
    assert [(layer.name, layer.num_experts, layer.score) for layer in find_moe_layers(model)] == expected
