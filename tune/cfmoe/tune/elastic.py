"""Elastic fine-tuning (DAFT): which layers are adapted, with what rank, and the LoRA adapter that does it.

A layer's need is what its expert consistency (ECR) on the target data lacks. `plan_ranks` turns needs into a LoRA rank per MoE layer;
`adapt` puts adapters on the attention, the shared and the routed experts of the layers that have one, and makes the routers
trainable: of all layers, since a router is a hundredth of a layer and every layer's cache shares one budget.

Transformers 5 holds the experts of a layer in two 3-D parameters and the router in a plain 2-D one, neither inside an nn.Linear.
LoRA reaches the experts through peft's target_parameters, one pair of factors per expert; the router is trained whole, as a copy that
peft keeps beside the original (modules_to_save), so that disabling the adapter gives back the base model's routing too.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cfmoe.errors import CFMoEError, os_error

ADAPTERS = ("lora", "router", "full")
# Linear layers of these names peft takes for the experts of transformers 4 and adapts the fused experts of every layer instead, so theirs
# are reached as parameters. Quantised to 4 bits they cannot be, and are left as they are.
_RENAMED = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
TRAINED = "trained.safetensors"  # of an adapter that is no LoRA: the trained parameters themselves


@dataclass(frozen=True)
class LoraSettings:
    """peft's names: the update is scaled by alpha / √rank (rsLoRA, Kalajdzievski, arXiv:2312.03732) or by alpha / rank."""

    alpha: float = 16.0
    rslora: bool = True
    dropout: float = 0.0


def plan_ranks(
    ecr: Sequence[float],  # per MoE layer, on the target data
    rank: int,
    threshold: float | None = None,
    rank_budget: int | None = None,
) -> list[int]:
    """The LoRA rank of every MoE layer, 0 where it is not adapted.

    Without `threshold` every layer is adapted, otherwise those with an ECR below it. Without `rank_budget` each of them gets `rank`;
    with it they share that sum of ranks in proportion to what they lack (threshold − ECR, or 1 − ECR), at least 1 each, by largest
    remainder.
    """
    chosen = [layer for layer, value in enumerate(ecr) if threshold is None or value < threshold]
    if not chosen:
        raise CFMoEError(f"--elastic-threshold {threshold} is at or below every layer's ECR (lowest {min(ecr):.3f}); use a higher one")
    ranks = [0] * len(ecr)
    if rank_budget is None:
        for layer in chosen:
            ranks[layer] = rank
        return ranks
    if rank_budget < len(chosen):
        raise CFMoEError(f"--elastic-rank-budget {rank_budget} is below one rank for each of {len(chosen)} layers; use at least that")
    need = [(1.0 if threshold is None else threshold) - ecr[layer] for layer in chosen]
    spare = rank_budget - len(chosen)
    shares = [spare * value / sum(need) if sum(need) > 0 else spare / len(chosen) for value in need]
    extra = [int(share) for share in shares]
    for index in sorted(range(len(chosen)), key=lambda i: (extra[i] - shares[i], i))[: spare - sum(extra)]:
        extra[index] += 1
    for layer, more in zip(chosen, extra, strict=True):
        ranks[layer] = 1 + more
    return ranks


def decoder_layer(router: str) -> str:
    """The module path of the decoder layer around a router: "model.layers.3.mlp.gate" → "model.layers.3"."""
    match = re.match(r"^(.*?\.\d+)\.", router)
    if match is None:
        raise CFMoEError(f"router {router} is not inside a numbered decoder layer; this model's structure is not known")
    return match[1]


def adapt(
    model: nn.Module,
    routers: Sequence[str],  # module path of every MoE layer's router
    adapter: str,
    ranks: Sequence[int] | None = None,  # per MoE layer; only for lora
    settings: LoraSettings | None = None,
) -> nn.Module:
    """The model with what `adapter` trains marked trainable: a PeftModel for lora, else `model` itself."""
    if adapter not in ADAPTERS:
        raise CFMoEError(f"adapter {adapter} is unknown; choose one of {', '.join(ADAPTERS)}")
    if adapter == "full":
        return model.requires_grad_(True)
    if adapter == "router":
        model.requires_grad_(False)
        for name in routers:
            model.get_submodule(name).float().requires_grad_(True)
        return model
    from peft import get_peft_model

    if ranks is None:
        raise ValueError("lora needs the ranks of its layers")
    config = _lora_config(model, routers, ranks, settings or LoraSettings())
    with _old_names():
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a step of the optimiser is below the resolution of bfloat16
    return adapted


@contextmanager
def _old_names() -> Iterator[None]:
    """Without transformers' warnings that peft still uses an attribute's old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
        yield


def _lora_config(model: nn.Module, routers: Sequence[str], ranks: Sequence[int], settings: LoraSettings) -> Any:
    from peft import LoraConfig

    layers = {decoder_layer(name): rank for name, rank in zip(routers, ranks, strict=True) if rank}
    modules, parameters = [], []
    for prefix in layers:
        for name, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            if name in routers:
                continue
            if isinstance(module, nn.Linear):
                if name.rpartition(".")[2] not in _RENAMED:
                    modules.append(name)
                elif module.weight.is_floating_point():
                    parameters.append(f"{name}.weight")
            parameters += [f"{name}.{key}" for key, value in module.named_parameters(recurse=False) if value.ndim == 3]
    if parameters and settings.dropout:
        raise CFMoEError("--lora-dropout is not possible on fused experts, whose adapter is added to the weights; leave it 0")
    highest = max(layers.values())
    return LoraConfig(
        r=highest,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern={rf"{re.escape(prefix)}\..*": rank for prefix, rank in layers.items() if rank != highest},
        modules_to_save=list(routers),
        task_type="CAUSAL_LM",
    )


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all of the base model) in numbers of values; LoRA factors and router copies count as trained alone."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n or ".modules_to_save." in n)
    return trained, sum(p.numel() for p in model.parameters()) - added


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, on the CPU, by the names that it has in `model`."""
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, path: Path) -> None:
    """Puts parameters from a safetensors file into `model`. Raises CFMoEError where the file is damaged or of another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        trained = load_file(path)
    except OSError as error:
        raise os_error(error, path, "read") from error
    except SafetensorError as error:
        raise CFMoEError(f"{path} is not a whole safetensors file: {error}; copy it again") from error
    own = dict(model.named_parameters())
    for name, value in trained.items():
        if name not in own or own[name].shape != value.shape:
            shape = "×".join(map(str, value.shape))
            raise CFMoEError(f"{path}: {name} ({shape}) is no parameter of this model; give the model that it was trained from")
    with torch.no_grad():
        for name, value in trained.items():
            own[name].copy_(value)


class Scale:
    """Moves a trained model along the line from where it began (0) to where training ended (1), and back.

    Wortsman et al., Robust fine-tuning of zero-shot models (arXiv:2109.01903). LoRA's update is a product that begins at zero, so of its
    factors B alone is scaled. Made before training; `keep` after it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name}
        self._start = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._end = self._start

    def keep(self) -> None:
        """Takes the present parameters as the end of the line."""
        self._end = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def set(self, scale: float) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(torch.lerp(self._start[name], self._end[name], scale))


def save_adapter(model: nn.Module, directory: Path) -> None:
    """Writes what was trained: peft's files for LoRA, otherwise the trained parameters as safetensors."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(directory))
        return
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f"{TRAINED}.tmp"
    save_file(trained_parameters(model), beside)
    os.replace(beside, directory / TRAINED)


def load_adapter(model: nn.Module, directory: Path) -> nn.Module:
    """`model` with the adapter that `save_adapter` wrote; not trainable."""
    if (directory / "adapter_config.json").is_file():
        from peft import PeftModel

        try:
            with _old_names():
                return PeftModel.from_pretrained(model, str(directory))
        except Exception as error:  # of many kinds, for a damaged file and for another model's
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CFMoEError(f"{directory} does not fit this model: {reason}; give the model that it was trained from") from error
    if not (directory / TRAINED).is_file():
        raise CFMoEError(f"{directory} holds neither adapter_config.json nor {TRAINED}; give the adapter directory of cfmoe tune")
    load_trained(model, directory / TRAINED)
    return model.requires_grad_(False)


def merge(model: nn.Module) -> nn.Module:
    """The plain model with the adapter added to its weights."""
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


def load_four_bit(directory: Path, dtype: torch.dtype) -> Any:
    """The checkpoint in `directory` for QLoRA: its linear layers in 4-bit NF4 (Dettmers et al., arXiv:2305.14314), the rest in `dtype`.

    Fused experts are no linear layers and stay in `dtype`. Raises CFMoEError where bitsandbytes or a CUDA device is missing.
    """
    import importlib.util

    import transformers

    installed = importlib.util.find_spec("bitsandbytes") is not None
    if not installed or not torch.cuda.is_available():
        lack = "there is no CUDA device" if installed else "bitsandbytes is not installed"
        raise CFMoEError(f"--qlora needs bitsandbytes and a CUDA device, and {lack}; leave it out or use another machine")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=settings, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
