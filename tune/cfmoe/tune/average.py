"""The mean of what was trained over the last steps: it keeps what they agree on, and loses much of what each strayed to.

Izmailov et al., Averaging weights leads to wider optima and better generalization (arXiv:1803.05407); here the learning rate goes on
falling to a floor meanwhile rather than being held or cycled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class TailAverage:
    """The uniform mean of the trainable parameters over the last `share` of `steps`; each process or shard keeps its own part.

    Of LoRA's update, a product, it is the product of the factors' means: along one run the two are close.
    """

    def __init__(self, model: nn.Module, share: float, steps: int) -> None:
        self.count = 0
        self._begin = self._taken = steps - max(1, round(share * steps))
        self._model = model
        self._mean: dict[str, torch.Tensor] = {}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, as it is now: FSDP puts shards in the place of the parameters when training begins."""
        return ((name, p) for name, p in self._model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters as they are after `step` steps, if that is one of the last ones; told twice of a step, once."""
        if step <= self._taken:
            return
        self._taken = step
        self.count += 1
        for name, parameter in self._parameters():
            if name in self._mean:
                self._mean[name].lerp_(parameter, 1 / self.count)
            else:
                self._mean[name] = parameter.detach().clone()

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the mean in the place of the parameters."""
        for name, parameter in self._parameters():
            if name in self._mean:
                parameter.copy_(self._mean[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The mean so far, on the CPU, by the parameters' names."""
        return {name: value.cpu().contiguous() for name, value in self._mean.items()}

    @torch.no_grad()
    def load_state_dict(self, mean: dict[str, torch.Tensor], count: int) -> None:
        self.count, self._taken = count, self._begin + count
        self._mean = {name: mean[name].to(parameter) for name, parameter in self._parameters() if name in mean}
