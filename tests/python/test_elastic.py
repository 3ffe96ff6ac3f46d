"""Elastic adapters: ranks by need, what really trains in every family, and that saving and merging change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cfmoe.errors import CFMoEError
from cfmoe.tune.elastic import (
    adapt,
    decoder_layer,
    load_adapter,
    load_four_bit,
    merge,
    plan_ranks,
    save_adapter,
    trainable_parameters,
)
from cfmoe.tune.locality import Locality, locality_loss
from cfmoe.tune.routers import RouterRecorder, find_moe_layers
from moe_models import random_tokens, tiny_model

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "granitemoe", "gpt_oss")
ECR = [0.2, 0.4, 0.3, 0.5]


def routers(model: torch.nn.Module) -> list[str]:
    return [layer.router_name for layer in find_moe_layers(model)]


def train(model: torch.nn.Module, steps: int = 2) -> None:
    """A few steps on random tokens for language modelling and locality together."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    segments = torch.zeros(2, 9, dtype=torch.int64)
    with RouterRecorder(model.train()) as recorder:
        loss = Locality("js", recorder.layers[0].top_k)
        for step in range(steps):
            tokens = random_tokens(seed=step)
            quality = model(input_ids=tokens, labels=tokens).loss
            (quality + locality_loss(loss, recorder.logits, segments)).backward()
            if step < steps - 1:
                optimiser.step()
                optimiser.zero_grad()
    optimiser.step()
    model.eval()


# --- ranks ------------------------------------------------------------------------------------------------------------------------


def test_ranks_by_threshold_and_by_need() -> None:
    assert plan_ranks(ECR, 8) == [8, 8, 8, 8]
    assert plan_ranks(ECR, 8, threshold=0.4) == [8, 0, 8, 0]
    # Below 0.45 the layers lack 0.25, 0.05 and 0.15 of 0.45: of the 9 ranks beyond one each 5, 1 and 3.
    assert plan_ranks(ECR, 8, threshold=0.45, rank_budget=12) == [6, 2, 4, 0]
    # Without a threshold they lack 0.8, 0.6, 0.7, 0.5 of 2.6: of 6 ranks 1.85, 1.38, 1.62, 1.15, rounded to 2, 1, 2, 1.
    assert plan_ranks(ECR, 8, rank_budget=10) == [3, 2, 3, 2]


@pytest.mark.parametrize("budget", range(4, 40))
def test_a_rank_budget_is_spent_exactly(budget: int) -> None:
    ranks = plan_ranks(ECR, 8, rank_budget=budget)
    assert sum(ranks) == budget and min(ranks) >= 1
    assert ranks[0] >= ranks[2] >= ranks[1] >= ranks[3]


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(CFMoEError, match=r"--elastic-threshold 0.1 is at or below every layer's ECR \(lowest 0.200\)"):
        plan_ranks(ECR, 8, threshold=0.1)
    with pytest.raises(CFMoEError, match="--elastic-rank-budget 3 is below one rank for each of 4 layers"):
        plan_ranks(ECR, 8, rank_budget=3)


def test_decoder_layer_of_a_router() -> None:
    assert decoder_layer("model.layers.3.mlp.gate") == "model.layers.3"
    assert decoder_layer("transformer.blocks.11.ffn.experts.0.router") == "transformer.blocks.11"
    with pytest.raises(CFMoEError, match="not inside a numbered decoder layer"):
        decoder_layer("model.gate")


# --- what trains ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_attention_and_routers_train_and_nothing_else(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=4)
    names = routers(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranks = [1] + [0] * (len(names) - 2) + [3]
    adapted = adapt(model, names, "lora", ranks)
    layers = [decoder_layer(name) for name in names]
    trained = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters() if p.requires_grad}
    for layer, rank in zip(layers, ranks, strict=True):
        factors = [name for name in trained if name.startswith(f"{layer}.") and "lora_A" in name]
        assert bool(factors) == bool(rank)
        assert any(".experts" in name for name in factors) == bool(rank), "the fused experts have no adapter"
        assert any("attn" in name or "attention" in name for name in factors) == bool(rank)
        assert any("shared_expert" in name for name in factors) == bool(rank and "shared_expert" in str(before.keys()))
        assert {trained[name].shape[0] for name in factors} <= {rank, 8 * rank}
    copies = {name.split(".modules_to_save")[0] for name in trained if ".modules_to_save." in name}
    assert copies == set(names)
    assert all(".lora_" in name or ".modules_to_save." in name for name in trained)

    start = {name: p.detach().clone() for name, p in trained.items()}
    train(adapted, steps=2)
    for name, p in trained.items():
        assert p.grad is not None, name
        if "correction_bias" not in name:  # moved by the load, not by a gradient
            assert not torch.equal(p, start[name]), f"{name} has not moved"
    frozen = {name: p for name, p in adapted.named_parameters() if not p.requires_grad}
    for name, p in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(p, before[plain]), plain


def test_switched_off_the_adapter_gives_the_base_model_back() -> None:
    model = tiny_model("qwen3_moe")
    tokens = random_tokens()
    with torch.no_grad():
        base = model(input_ids=tokens).logits.clone()
        adapted = adapt(model, routers(model), "lora", [2] * len(routers(model)))
        torch.testing.assert_close(adapted(input_ids=tokens).logits, base)  # before training it adds nothing
    train(adapted)
    with torch.no_grad():
        assert (adapted(input_ids=tokens).logits - base).abs().max() > 1e-3
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=tokens).logits, base)


@pytest.mark.parametrize("adapter", ["router", "full"])
def test_routers_alone_and_everything(adapter: str) -> None:
    model = tiny_model("olmoe")
    names = routers(model)
    adapt(model, names, adapter)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    router_weights = [f"{name}.weight" for name in names]
    assert trained == (router_weights if adapter == "router" else [name for name, _ in model.named_parameters()])
    train(model)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("adapter", ["lora", "router"])
def test_what_trains_is_float32_on_a_half_precision_base(adapter: str) -> None:
    model = tiny_model("qwen3_moe").bfloat16()
    names = routers(model)
    adapted = adapt(model, names, adapter, [2] * len(names))
    kinds = {(p.requires_grad, p.dtype) for p in adapted.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_trainable_parameters_are_counted() -> None:
    model = tiny_model("olmoe")
    everything = sum(p.numel() for p in model.parameters())
    names = routers(model)
    adapted = adapt(model, names, "lora", [2, 0, 0])
    trained, base = trainable_parameters(adapted)
    assert base == everything
    # Attention: 4 projections of 16×16. 8 experts: 16→48 for gate and up together, 24→16 for down. Routers: 3 of 8×16.
    assert trained == 2 * (4 * 32 + 8 * (16 + 48) + 8 * (24 + 16)) + 3 * 8 * 16


# --- saving and merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("adapter", ["lora", "router", "full"])
def test_saved_loaded_and_merged_it_predicts_the_same(tmp_path: Path, adapter: str, family: str) -> None:
    model, tokens = tiny_model(family), random_tokens()
    names = routers(model)
    adapted = adapt(model, names, adapter, [2, *[3] * (len(names) - 1)])
    train(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        loaded = load_adapter(tiny_model(family), tmp_path / "adapter")
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected)
        assert not any(p.requires_grad for p in loaded.parameters())
        merged = merge(loaded)
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert sorted(merged.state_dict()) == sorted(tiny_model(family).state_dict())


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", hidden_size=32)
    save_adapter(adapt(model, routers(model), "router"), tmp_path / "router")
    with pytest.raises(CFMoEError, match=r"gate.weight \(8×16\) is no parameter of this model; give the model that it was trained from"):
        load_adapter(other, tmp_path / "router")
    save_adapter(adapt(model, routers(model), "lora", [2, 2]), tmp_path / "lora")
    with pytest.raises(CFMoEError, match="does not fit this model"):
        load_adapter(other, tmp_path / "lora")
    with pytest.raises(CFMoEError, match=r"holds neither adapter_config.json nor trained.safetensors"):
        load_adapter(tiny_model("mixtral"), tmp_path)
    (tmp_path / "router" / "trained.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CFMoEError, match="is not a whole safetensors file"):
        load_adapter(tiny_model("qwen3_moe"), tmp_path / "router")


def test_four_bits_without_the_means_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CFMoEError, match="--qlora needs bitsandbytes and a CUDA device, and"):
        load_four_bit(tmp_path, torch.bfloat16)


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(CFMoEError, match="adapter dora is unknown; choose one of lora, router, full"):
        adapt(tiny_model("olmoe"), [], "dora")
