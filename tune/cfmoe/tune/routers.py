"""Finds the MoE layers of any Hugging Face model by structure and configuration, and records what their routers decide.

A MoE block is a module with two kinds of children side by side: experts (a fused tensor whose first dimension counts them, as in
transformers 5, or a list of equal modules) and one router, which maps a hidden state to one score per expert. How many experts there
are has to agree with config.json, so that no convolution or list of layers is taken for experts.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from cfmoe.errors import CFMoEError

# num_experts, num_local_experts, n_routed_experts, moe_num_experts, …
_EXPERT_COUNT = re.compile(r"(?:^|_)(?:num|n)_(?!shared)(?:\w+_)?experts$")
# num_experts_per_tok, top_k, moe_topk, moe_top_k, top_k_experts, …
_TOP_K = re.compile(r"^(?:(?:num|n)_(?:\w+_)?experts_per_tok(?:en)?|(?:moe_|router_)?top_?k(?:_experts)?)$")
# scoring_func, score_function, expert_selection_fn, …
_SCORE_FUNCTION = re.compile(r"scor\w*_f(?:n|unc\w*)$|selection_f(?:n|unc\w*)$|router_activation\w*$")
_GENERAL_LIBRARIES = ("torch.", "peft.", "bitsandbytes.")


@dataclass(frozen=True)
class MoELayer:
    """The `index`-th MoE layer of a model. `score` is the function that turns logits into the experts' scores, softmax or sigmoid."""

    index: int
    name: str  # module path of the block
    block: nn.Module
    router_name: str
    router: nn.Module
    num_experts: int
    top_k: int
    score: str
    expert_names: tuple[str, ...]  # module paths of what holds the experts
    experts: tuple[nn.Module, ...] = field(repr=False)
    logits_at: int | None = field(repr=False)  # where the model itself says that the router's output has the logits


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of `model` in the order of its modules; an adapter or a quantised linear layer in them does not matter.

    To be called before FSDP flattens the model's parameters; what was found stays right.
    Raises CFMoEError where there are none, or where a layer's router or number of chosen experts cannot be told.
    """
    counts = set(_config_integers(model, _EXPERT_COUNT))
    layers: list[MoELayer] = []
    for name, module in model.named_modules():
        experts = None if _unwrapped(module) is not module else _experts(module, counts)  # LoRA of rank 1 looks like a router
        if experts is None:
            continue
        count, children = experts
        router_name = _router(name, module, count, children)
        if router_name is None:
            continue
        router = module.get_submodule(router_name)
        layers.append(
            MoELayer(
                index=len(layers),
                name=name,
                block=module,
                router_name=_join(name, router_name),
                router=router,
                num_experts=count,
                top_k=_top_k(model, name, module, router, count),
                score=_score(model, module, router),
                expert_names=tuple(_join(name, child) for child in children),
                experts=tuple(module.get_submodule(child) for child in children),
                logits_at=_declared_index(model, router),
            )
        )
    if not layers:
        raise CFMoEError(
            f"{type(model).__name__} has no MoE layer: no module has experts (a tensor or list of as many as config.json says: "
            f"{', '.join(map(str, sorted(counts))) or 'no such number'}) beside a router with one row per expert; give a MoE model"
        )
    return layers


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _unwrapped(module: nn.Module) -> nn.Module:
    """What an adapter of peft wraps; `module` itself where none does."""
    while isinstance(inner := getattr(module, "base_layer", None) or getattr(module, "original_module", None), nn.Module):
        module = inner
    return module


def _classes(module: nn.Module) -> tuple[type, ...]:
    """The classes of `module` below nn.Module."""
    classes = type(module).__mro__
    return classes[: classes.index(nn.Module)]


def _has_own_code(module: nn.Module) -> bool:
    """Whether `module` is of the model's own code, also where a library has derived a class from it; not of a general library."""
    return not all(base.__module__.startswith(_GENERAL_LIBRARIES) for base in _classes(module))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape that a parameter has when DeepSpeed's ZeRO-3 has not taken it to pieces."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _experts(module: nn.Module, counts: set[int]) -> tuple[int, list[str]] | None:
    """How many experts the children of `module` hold, and which children; None where they hold none."""
    found: dict[str, int] = {}
    for name, child in module.named_children():
        child = _unwrapped(child)
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            members = [_unwrapped(member) for member in child.children()]
            alike = len({type(member) for member in members}) == 1 and next(members[0].parameters(), None) is not None
            if len(members) in counts and alike:
                found[name] = len(members)
        elif _has_own_code(child):
            sizes = {_shape(parameter)[0] for parameter in child.parameters(recurse=False) if len(_shape(parameter)) == 3}
            if len(sizes) == 1 and sizes <= counts:
                found[name] = sizes.pop()
    # An encoder's list of layers beside something else is no set of experts: all have to count alike.
    return (next(iter(found.values())), list(found)) if len(set(found.values())) == 1 else None


def _matrices(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(rows, columns) of every matrix that `module` multiplies with; a linear layer's whatever its weight is stored as."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        rows, columns = getattr(part, "out_features", None), getattr(part, "in_features", None)
        if isinstance(rows, int) and isinstance(columns, int):
            yield rows, columns
        else:
            for parameter in part.parameters(recurse=False):
                if len(shape := _shape(parameter)) == 2:
                    yield shape[0], shape[1]


def _router(name: str, module: nn.Module, count: int, experts: Sequence[str]) -> str | None:
    """The child of `module` that scores its experts: of those with a matrix of `count` rows the one with the fewest matrices."""
    candidates: dict[str, int] = {}
    for child_name, child in module.named_children():
        matrices = list(_matrices(child))
        if child_name not in experts and any(rows == count for rows, _ in matrices):
            candidates[child_name] = len(matrices)
    fewest = [child_name for child_name, size in candidates.items() if size == min(candidates.values())]
    if len(fewest) > 1:
        raise CFMoEError(f"{name}: {' and '.join(fewest)} both look like the router of its {count} experts; the family is not supported")
    return fewest[0] if fewest else None


def _configs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The model's configuration and, nested in it, those of its parts."""
    for module in model.modules():
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        if to_dict is not None:
            yield from _nested(to_dict())
            return


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


def _integers(values: dict[str, Any], pattern: re.Pattern[str]) -> Iterator[int]:
    """The integers, also in lists, whose names match."""
    for name, value in values.items():
        if pattern.search(str(name)):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, int) and not isinstance(item, bool) and item > 0:
                    yield item


def _config_integers(model: nn.Module, pattern: re.Pattern[str]) -> list[int]:
    return [value for config in _configs(model) for value in _integers(config, pattern)]


def _top_k(model: nn.Module, name: str, block: nn.Module, router: nn.Module, count: int) -> int:
    """Experts per token: as the router, else the block, else the configuration says."""
    for values in (vars(_unwrapped(router)), vars(block)):
        for value in _integers(values, _TOP_K):
            return value
    found = set(_config_integers(model, _TOP_K))
    if len(found) != 1 or max(found) > count:
        raise CFMoEError(f"{name}: cannot tell how many of its {count} experts a token gets; the family is not supported")
    return found.pop()


def _score(model: nn.Module, block: nn.Module, router: nn.Module) -> str:
    """softmax or sigmoid: whichever the router's code calls, the block's where the router is a plain matrix, else what config.json says."""
    parts = [part for part in router.modules() if _has_own_code(part)]
    called = _called(parts or [block]) & {"softmax", "sigmoid"}
    if not parts and len(called) == 2:
        called.remove("sigmoid")  # a block with a softmax has the sigmoid for its shared expert
    if len(called) != 1:
        texts = [str(value) for config in _configs(model) for name, value in config.items() if _SCORE_FUNCTION.search(str(name))]
        called = set(texts)
    if len(called) != 1:
        raise CFMoEError(f"{type(router).__name__}: cannot tell how it scores its experts; the family is not supported")
    return called.pop()


def _called(modules: Iterable[nn.Module]) -> set[str]:
    """The names that the methods of `modules` use, and those that functions of their own files which they call use."""
    names: set[str] = set()
    for module in modules:
        for base in _classes(module):
            for method in vars(base).values():
                if isinstance(function := inspect.unwrap(method) if callable(method) else None, FunctionType):
                    names.update(_names(function.__code__))
                    helpers = [function.__globals__.get(name) for name in function.__code__.co_names]
                    for helper in helpers:
                        if isinstance(helper, FunctionType) and helper.__module__ == function.__module__:
                            names.update(_names(helper.__code__))
    return names


def _names(code: CodeType) -> set[str]:
    nested = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*nested)


def _declared_index(model: nn.Module, router: nn.Module) -> int | None:
    """Where in the router's output the model, for its own output_router_logits, says that the logits are; None where it does not say."""
    for module in model.modules():
        declared = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits")
        for recorder in declared if isinstance(declared, list | tuple) else (declared,):
            target = getattr(recorder, "target_class", None)
            if isinstance(target, type) and isinstance(_unwrapped(router), target):
                return int(recorder.index)
    return None


class RouterRecorder:
    """Records what the routers of `layers` decide in each forward pass, from `with` to its end.

    After a forward pass, `logits` and `ids` tell of that pass alone. Recomputation for gradient checkpointing is not recorded again.
    The tensors keep the graph of their pass alive until the next pass or `clear`. Enter before a `torch.compile`d model runs first,
    since what is compiled by then does not look for hooks.
    """

    def __init__(self, layers: Sequence[MoELayer] | nn.Module) -> None:
        self.layers = find_moe_layers(layers) if isinstance(layers, nn.Module) else list(layers)
        self._handles: list[Any] = []
        self._probabilities: list[bool | None] = [None] * len(self.layers)  # whether a router gives these; not known before a pass
        self.clear()

    def clear(self) -> None:
        """Forgets the last pass."""
        self._scores: list[Tensor | None] = [None] * len(self.layers)
        self._routed: list[Tensor | None] = [None] * len(self.layers)
        self._received: list[Tensor | None] = [None] * len(self.layers)

    @property
    def logits(self) -> list[Tensor]:
        """The scores before softmax or sigmoid: (batch × seq, experts) per layer, attached to the graph; empty before the first pass.

        Where a router gives probabilities only, their logarithms. Raises CFMoEError where the last pass has not reached every router,
        or hides the gradients of the routers.
        """
        found = []
        for i, (layer, scores) in enumerate(zip(self.layers, self._complete(), strict=False)):
            _check_differentiable(layer, scores)
            if self._probabilities[i] is None:
                self._probabilities[i] = _are_probabilities(scores)
            found.append(scores.clamp_min(torch.finfo(scores.dtype).tiny).log() if self._probabilities[i] else scores)
        return found

    @property
    def ids(self) -> list[Tensor]:
        """The experts that each token went to: (batch × seq, top_k) int64 per layer, in the order in which the experts got them.

        Some routers do not sort what they choose: then this order is not best first.
        """
        found = []
        for i, (layer, scores) in enumerate(zip(self.layers, self._complete(), strict=False)):
            ids = self._received[i]
            if ids is None:
                ids = self._routed[i]
            if ids is None:
                ids = scores.topk(layer.top_k, dim=-1).indices
            found.append(ids.detach().reshape(-1, layer.top_k).long())
        return found

    def __enter__(self) -> Self:
        self.clear()
        for i, layer in enumerate(self.layers):
            self._handles.append(layer.router.register_forward_hook(partial(self._on_router, i)))
            for module in layer.experts:
                self._handles.append(module.register_forward_pre_hook(partial(self._on_experts, i), with_kwargs=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _complete(self) -> list[Tensor]:
        """What every router gave, or nothing where none ran."""
        complete = [scores for scores in self._scores if scores is not None]
        if complete and len(complete) < len(self.layers):
            missing = self.layers[[scores is None for scores in self._scores].index(True)]
            raise CFMoEError(f"the forward pass went past the router {missing.router_name}; record a pass through the whole model")
        return complete

    def _on_router(self, i: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if _in_backward():
            return
        if i == 0:  # a new pass
            self.clear()
        self._scores[i] = _find_scores(self.layers[i], output)
        self._routed[i] = _find_ids(self.layers[i], _tensors(output))

    def _on_experts(self, i: int, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not _in_backward():
            self._received[i] = _find_ids(self.layers[i], _tensors((*inputs, *keywords.values())))


def _in_backward() -> bool:
    """Whether autograd runs just now: a forward pass inside it is a recomputation for gradient checkpointing.

    The compiler cannot trace this question and breaks its graph here, which is meant: out of a checkpointed graph nothing can be taken.
    """
    return torch._C._current_graph_task_id() != -1


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in (values if isinstance(values, list | tuple) else (values,)) if isinstance(value, Tensor)]


def _find_scores(layer: MoELayer, output: Any) -> Tensor:
    """(tokens, experts): the router's output where the model says, else its only floating-point tensor as wide as there are experts."""
    if layer.logits_at is not None and isinstance(output, list | tuple):
        found = [output[layer.logits_at]]
    else:
        found = [value for value in _tensors(output) if value.is_floating_point() and value.shape[-1] == layer.num_experts]
    if len(found) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in _tensors(output))
        raise CFMoEError(f"{layer.router_name} returns tensors of the shapes {shapes}: which are its logits cannot be told")
    return found[0].reshape(-1, layer.num_experts)


def _are_probabilities(scores: Tensor) -> bool:
    """Whether no score is negative and every row adds up to one, which logits do not do."""
    rows = scores.detach().float()
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 0.01).all())


def _check_differentiable(layer: MoELayer, scores: Tensor) -> None:
    """Raises CFMoEError where a loss on `scores` would train nothing although the router is to be trained."""
    trained = layer.block.training and any(parameter.requires_grad for parameter in layer.router.parameters())
    if torch.is_grad_enabled() and trained and not scores.requires_grad:
        raise CFMoEError(
            f"{layer.router_name} ran without gradients, as it does under reentrant gradient checkpointing; "
            'choose gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def _find_ids(layer: MoELayer, values: list[Tensor]) -> Tensor | None:
    """The integer tensor (…, top_k) among `values`, None where there is none."""
    for value in values:
        if value.dtype in (torch.int64, torch.int32) and value.dim() >= 2 and value.shape[-1] == layer.top_k:
            return value
    return None
