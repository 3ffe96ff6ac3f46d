"""How strongly locality is asked for at each step: a fixed weight that ramps up, or the weight that a quality budget allows."""

from __future__ import annotations

import math


def weight_at(
    step: int,  # from 0
    total: int,
    weight: float,
    ramp: float = 0.1,  # share of all steps
    release: float = 0.0,  # share of all steps, at the end
) -> float:
    """`weight`, after a linear rise over the first `ramp` of the steps; over the last `release` it falls to 0, so that quality recovers."""
    rise = min(1.0, (step + 1) / max(1.0, ramp * total))
    fall = min(1.0, (total - step) / max(1.0, release * total)) if release else 1.0
    return weight * min(rise, fall)


class QualityBudget:
    """Chooses the weight: as much locality as costs `budget` of perplexity (0.005 is half a percent).

    The weight is the multiplier of the constraint excess ≤ ln(1 + budget), where the excess is the loss above the base model's in
    nats per token; it is moved by exponentiated gradient ascent (Kivinen and Warmuth, Information and Computation 132, 1997):
    λ ← λ · exp(rate · (1 − excess / ln(1 + budget))), with the excess averaged over about 1 / (1 − smoothing) steps.
    """

    def __init__(self, budget: float, start: float = 0.1, rate: float = 0.03, smoothing: float = 0.9) -> None:
        self.target = math.log1p(budget)
        self.weight = start
        self.rate = rate
        self.smoothing = smoothing
        self.excess: float | None = None

    def update(self, excess: float) -> float:
        """Takes the excess loss of a step; returns the weight for the next one."""
        self.excess = excess if self.excess is None else self.smoothing * self.excess + (1 - self.smoothing) * excess
        pull = max(-3.0, min(1.0, 1 - self.excess / self.target))
        self.weight = min(100.0, max(1e-4, self.weight * math.exp(self.rate * pull)))
        return self.weight

    def state_dict(self) -> dict[str, float | None]:
        return {"weight": self.weight, "excess": self.excess}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        self.weight = float(state["weight"] or 0.0)
        self.excess = state["excess"]
