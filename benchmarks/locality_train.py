"""Training and measuring for benchmarks/locality.py: what one run is, the plans, the data that runs share."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from locality_measure import UNTOUCHED, VALIDATION, Rows, evaluate, halves, pooled, question_rows, text_rows, tokenise
from torch import Tensor
from torch.nn import functional

from cfmoe.tune.average import TailAverage
from cfmoe.tune.checkpoint import load_model
from cfmoe.tune.elastic import LoraSettings, adapt, merge, plan_ranks, save_adapter, trainable_parameters
from cfmoe.tune.locality import Locality, locality_loss, segment_ids
from cfmoe.tune.own_text import OPENING, own_text
from cfmoe.tune.routers import RouterRecorder, find_moe_layers
from cfmoe.tune.schedule import QualityBudget, weight_at


@dataclass(frozen=True)
class Run:
    """One training run; its fields are all that tells it from another."""

    name: str
    adapter: str = "lora"  # lora, router, full, elastic
    kind: str = "none"
    weight: float = 0.0
    budget: float = 0.0  # of perplexity; above 0 it chooses the weight
    quality: str = "distill"  # distill, ce, or mix of both in halves
    steps: int = 300
    batch: int | None = None  # rows; that of the command by default
    lr: float = 1e-3
    rank: int = 16
    alpha: float = 16.0
    threshold: float | None = None
    rank_budget: int | None = None
    seed: int = 0
    text: str = "corpus"  # corpus, own (written by the base model), or both in turn
    ramp: float = 0.1
    release: float = 0.0
    floor: float = 0.0  # of the learning rate, as a share of the highest; it falls to it as a cosine
    average: float = 0.0  # share of the steps, the last ones, whose mean is measured
    layer_weights: tuple[float, ...] | None = None
    settings: dict[str, float] = field(default_factory=dict)  # of the loss


# --- the plans --------------------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "js": (0.15, 0.4, 1.0),
    "kl": (0.04, 0.1, 0.25),
    "l2": (0.3, 1.0, 3.0),
    "overlap": (0.05, 0.1, 0.2),
    "hinge": (0.1, 0.2, 0.4),
    "window": (0.15, 0.3, 0.6),
    "cache": (0.15, 0.3, 0.6),
}
LEARNING_RATE = {"lora": 1e-3, "elastic": 1e-3, "router": 1e-3, "full": 2e-4}


def screen(steps: int, kinds: Sequence[str], adapters: Sequence[str]) -> Iterator[Run]:
    """Loss kinds × weights × adapters, one seed; the middle weights come first, so that a call cut short has seen every kind."""
    for adapter in adapters:
        yield Run(f"{adapter}-none", adapter, steps=steps, lr=LEARNING_RATE[adapter])
    for index in (1, 0, 2):
        for adapter in adapters:
            for kind in kinds:
                weight = WEIGHTS[kind][index]
                yield Run(f"{adapter}-{kind}-{weight:g}", adapter, kind, weight, steps=steps, lr=LEARNING_RATE[adapter])


def elastic(run: Run, threshold: float, rank_budget: int | None) -> Run:
    return replace(run, threshold=threshold, rank_budget=rank_budget) if run.adapter == "elastic" else run


# --- training ---------------------------------------------------------------------------------------------------------------------


def quality_terms(run: Run, logits: Tensor, teacher: Tensor, tokens: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The quality term, and by how much the data's loss is above the base model's; both in nats per wanted token."""
    places = wanted[:, 1:]
    own = functional.log_softmax(logits[:, :-1][places].float(), dim=-1)
    base = functional.log_softmax(teacher[:, :-1][places].float(), dim=-1)
    target = tokens[:, 1:][places][:, None]
    loss = -own.gather(-1, target).mean()
    excess = loss.detach() + base.gather(-1, target).mean()
    if run.quality == "ce":
        return loss, excess
    # KL(base ‖ tuned) at temperature 1: Hinton et al., arXiv:1503.02531
    divergence = (base.exp() * (base - own)).sum(-1).mean()
    return (divergence if run.quality == "distill" else (divergence + loss) / 2), excess


def train(run: Run, bench: Bench) -> dict[str, Any]:
    """Trains one run and measures it."""
    torch.manual_seed(run.seed)
    device = bench.device
    bf16 = device == "cuda"
    model = load_model(bench.model, torch.device(device), "bfloat16" if bf16 and run.adapter != "full" else "float32")
    layers = find_moe_layers(model)
    ranks = plan_ranks(bench.base_figures["ecr"], run.rank, run.threshold, run.rank_budget)
    adapter = "lora" if run.adapter == "elastic" else run.adapter
    model = adapt(model, [layer.router_name for layer in layers], adapter, ranks, LoraSettings(run.alpha))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=bf16)
    loss_of = Locality(run.kind, layers[0].top_k, **run.settings) if run.kind != "none" else None
    control = QualityBudget(run.budget) if run.budget else None
    data = bench.text(run.text)
    order = torch.Generator().manual_seed(run.seed)
    batch = run.batch or bench.batch
    picks = torch.cat([torch.randperm(len(data), generator=order) for _ in range(1 + run.steps * batch // len(data))])
    average = TailAverage(model, run.average, run.steps) if run.average else None
    shares = None if run.layer_weights is None else torch.tensor(run.layer_weights, device=device)
    recorder = RouterRecorder(model.train())
    recorder.__enter__()
    log, weight, start = [], 0.0, time.perf_counter()
    for step in range(run.steps):
        tokens, wanted, real = data.take(picks[step * batch : (step + 1) * batch], device)
        fall = run.floor + (1 - run.floor) * 0.5 * (1 + math.cos(math.pi * step / run.steps))
        scale = min(1.0, (step + 1) / (0.05 * run.steps)) * fall
        for group in optimiser.param_groups:
            group["lr"] = run.lr * scale
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                teacher = bench.base(input_ids=tokens, use_cache=False).logits
            logits = model(input_ids=tokens, use_cache=False).logits
        quality, excess = quality_terms(run, logits, teacher, tokens, wanted)
        del teacher, logits
        total, local = quality, quality.new_zeros(())
        if loss_of is not None:
            weight = weight_at(step, run.steps, control.weight if control else run.weight, run.ramp, run.release)
            local = locality_loss(loss_of, recorder.logits, segment_ids(real, None), recorder.ids, shares)
            total = quality + weight * local
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if average is not None:
            average.update(step + 1)
        if control is not None:
            control.update(excess.item())
        if step % 20 == 0 or step == run.steps - 1:
            log.append([step, round(quality.item(), 5), round(excess.item(), 5), round(local.item(), 5), weight])
            bench.say(f"{run.name} {step}/{run.steps} quality {log[-1][1]} locality {log[-1][3]} weight {weight:.4g}")
    recorder.__exit__(None, None, None)
    seconds = time.perf_counter() - start
    count, _ = trainable_parameters(model)
    last = None
    if average is not None:
        last = evaluate(_plain(copy.deepcopy(model)), bench.eval_rows, device)
        average.apply()
    if bench.keep is not None and re.search(bench.keep, run.name):
        model = model.bfloat16()  # half the file, and what is measured is what is kept
        save_adapter(model, bench.out / f"{run.name}.adapter")
    measured = evaluate(_plain(model), bench.eval_rows, device)
    return {
        "run": asdict(run),
        "ranks": ranks,
        "trained": count,
        "seconds": seconds,
        "batch": [batch, bench.length],
        "log": log,
        "eval": measured,
        **({} if last is None else {"eval_without_average": last}),
    }


def _plain(model: Any) -> Any:
    """The model with the adapter folded in, rounded to bfloat16 as it will be shipped, to be measured in float32."""
    return merge(model.float()).bfloat16().float()


class Bench:
    """What all runs of a process share: the base model, the data and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.model: Path = options.model
        self.device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch, self.length = options.batch, options.length
        self.keep: str | None = options.keep
        self.quiet: bool = options.quiet
        if options.questions:
            every = question_rows(options.questions, self.model, self.length)
            held = torch.arange(len(every)) % 20 == 0
            self.train_rows, kept_back = (Rows(every.tokens[w], every.wanted[w], every.real[w]) for w in (~held, held))
            self.eval_rows, self.trained, self.validation = {"questions": kept_back}, ["questions"], ["questions"]
        else:
            train = tokenise(options.train, self.model, self.out / "train.npz")
            held_out = tokenise(options.eval, self.model, self.out / "eval.npz")
            self.train_rows = text_rows([train[name] for name in sorted(train) if name not in UNTOUCHED], self.length)
            # Of the domains trained on every second document is for choices, such as of a scale, and the others for what is reported.
            streams: dict[str, np.ndarray] = {}
            for name, stream in held_out.items():
                if name in UNTOUCHED:
                    streams[name] = stream
                else:
                    streams[name], streams[name + VALIDATION] = halves(stream)
            cut = {name: text_rows([stream], self.length, options.eval_rows) for name, stream in streams.items()}
            self.eval_rows = {name: one for name, one in cut.items() if len(one)}
            self.validation = [name for name in self.eval_rows if name.endswith(VALIDATION)]
            self.trained = [name for name in self.eval_rows if name not in UNTOUCHED and name not in self.validation]
        if self.device == "cuda":
            self.train_rows = self.train_rows.to(self.device)
        self.own_rows: Rows | None = None
        self.base = load_model(self.model, torch.device(self.device), "float32").requires_grad_(False)
        kept = self.out / "base.json"
        if not kept.exists():
            measured = evaluate(self.base, self.eval_rows, self.device)
            groups = {"trained": self.trained, "validation": self.validation}
            write_json(kept, {"eval": measured, **groups, "length": self.length})
        base = json.loads(kept.read_text())
        self.base_figures = pooled(base["eval"], base["validation"])
        if self.device == "cuda":
            self.base = self.base.bfloat16()

    def text(self, kind: str) -> Rows:
        """The rows to train on."""
        if kind == "corpus":
            return self.train_rows
        if self.own_rows is None:
            self.own_rows = text_rows([np.load(self.own_text_path).ravel()], self.length).to(self.device)
        if kind == "own":
            return self.own_rows
        parts = [(getattr(self.train_rows, name), getattr(self.own_rows, name)) for name in ("tokens", "wanted", "real")]
        count = min(len(self.train_rows), len(self.own_rows))
        return Rows(*(torch.cat([one[:count], other[:count]]) for one, other in parts))

    @property
    def own_text_path(self) -> Path:
        return self.out / "own.npy"

    def write_own_text(self, count: int, batch: int, seconds: float) -> None:
        """Keeps text of the base model, opened with the beginnings of `count` training rows."""
        if self.own_text_path.exists() or count == 0:
            return
        torch.manual_seed(0)
        picks = torch.randint(len(self.train_rows), (count,))
        openings = self.train_rows.tokens[picks.to(self.train_rows.tokens.device), :OPENING].tolist()
        written = own_text(self.base, openings, self.length, 0, batch, seconds)
        beside = self.out / "own.tmp.npy"
        np.save(beside, np.array(written, np.uint16))
        os.replace(beside, self.own_text_path)
        self.say(f"the base model wrote {len(written)} rows")

    def say(self, line: str) -> None:
        if not self.quiet:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def write_json(path: Path, value: object) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(value) + "\n")
    os.replace(beside, path)
