"""How much expert memory locality saves, and what it costs: the Pareto table of docs/locality.md.

Run as: python benchmarks/locality.py run --plan screen --model DIR --train corpus_train.jsonl.xz --eval corpus_eval.jsonl.xz --out DIR
        python benchmarks/locality.py report --out DIR

Every run of a plan is one JSON file in the output folder, so a second call goes on where the first was stopped. --minutes ends a call
in time, --processes lets several small runs share one GPU. Trains on some domains of a domain-labelled corpus and measures held-out
documents of these and of the untouched ones: loss, ECR, and the exact hit rate of one LRU cache at every size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / root) for root in ("common", "tune"))]  # a machine that only measures needs no build

from locality_measure import (  # noqa: E402
    UNTOUCHED,
    Rows,
    equal_hit_size,
    evaluate,
    pooled,
    question_rows,
    text_rows,
    tokenise,
)

from cfmoe.tune.checkpoint import load_model  # noqa: E402
from cfmoe.tune.elastic import LoraSettings, adapt, load_adapter, merge, plan_ranks, save_adapter, trainable_parameters  # noqa: E402
from cfmoe.tune.locality import KINDS, Locality, locality_loss, segment_ids  # noqa: E402
from cfmoe.tune.own_text import OPENING, own_text  # noqa: E402
from cfmoe.tune.routers import RouterRecorder, find_moe_layers  # noqa: E402
from cfmoe.tune.schedule import QualityBudget, weight_at  # noqa: E402


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
    settings: dict[str, float] = field(default_factory=dict)  # of the loss


# --- the plans --------------------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "js": (0.1, 0.3, 1.0),
    "kl": (0.02, 0.06, 0.2),
    "l2": (0.3, 1.0, 3.0),
    "overlap": (0.03, 0.06, 0.12),
    "hinge": (0.05, 0.1, 0.2),
    "window": (0.1, 0.2, 0.4),
    "cache": (0.2, 0.5, 1.0),
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
    ranks = plan_ranks(bench.base_ecr, run.rank, run.threshold, run.rank_budget)
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
    recorder = RouterRecorder(model.train())
    recorder.__enter__()
    log, weight, start = [], 0.0, time.perf_counter()
    for step in range(run.steps):
        tokens, wanted, real = data.take(picks[step * batch : (step + 1) * batch], device)
        scale = min(1.0, (step + 1) / (0.05 * run.steps)) * 0.5 * (1 + math.cos(math.pi * step / run.steps))
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
            local = locality_loss(loss_of, recorder.logits, segment_ids(real, None), recorder.ids)
            total = quality + weight * local
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if control is not None:
            control.update(excess.item())
        if step % 20 == 0 or step == run.steps - 1:
            log.append([step, round(quality.item(), 5), round(excess.item(), 5), round(local.item(), 5), weight])
            bench.say(f"{run.name} {step}/{run.steps} quality {log[-1][1]} locality {log[-1][3]} weight {weight:.4g}")
    seconds = time.perf_counter() - start
    count, _ = trainable_parameters(model)
    if run.name in bench.keep or bench.keep == ["all"]:
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
    }


def _plain(model: Any) -> Any:
    """The model with the adapter folded in, rounded to bfloat16 as it will be shipped, to be measured in float32."""
    return merge(model.float()).bfloat16().float()


def scaled(options: argparse.Namespace) -> None:
    """Measures points between the base model and adapters: base + scale · (tuned − base), of each adapter and of their mean.

    Wortsman et al., Robust fine-tuning of zero-shot models (arXiv:2109.01903) and Model soups (arXiv:2203.05482).
    """
    bench = Bench(options)
    start = {name: value.clone() for name, value in bench.base.float().state_dict().items()}
    paths = [Path(path) for path in options.adapters_in.split(",")]
    changes = []
    for path in paths:
        tuned = merge(load_adapter(load_model(bench.model, torch.device(bench.device), "float32"), path)).state_dict()
        changes.append({name: tuned[name] - value for name, value in start.items()})
    mean = {name: torch.stack([change[name] for change in changes]).mean(0) for name in start}
    named = {options.name: mean} if len(paths) > 1 else {}
    if not options.mean_only:
        named |= {path.stem: change for path, change in zip(paths, changes, strict=True)}
    for scale in map(float, options.scales.split(",")):
        for name, change in named.items():
            done = bench.out / f"scale-{scale:g}-{name}.json"
            if done.exists():
                continue
            model = load_model(bench.model, torch.device(bench.device), "float32")
            model.load_state_dict({key: (value + scale * change[key]).bfloat16().float() for key, value in start.items()})
            measured = evaluate(model, bench.eval_rows, bench.device)
            facts = {"name": done.stem, "adapter": "mean" if name == options.name else "scaled", "kind": "cache", "weight": scale}
            write_json(done, {"run": facts, "trained": 0, "eval": measured})
            bench.say(f"{done.stem} measured")


class Bench:
    """What all runs of a process share: the base model, the data and where results go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out
        self.model: Path = options.model
        self.device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch, self.length = options.batch, options.length
        self.keep: list[str] = options.keep.split(",") if options.keep else []
        self.quiet: bool = options.quiet
        if options.questions:
            every = question_rows(options.questions, self.model, self.length)
            held = torch.arange(len(every)) % 20 == 0
            self.train_rows, kept_back = (Rows(every.tokens[w], every.wanted[w], every.real[w]) for w in (~held, held))
            self.eval_rows, self.trained = {"questions": kept_back}, ["questions"]
        else:
            train = tokenise(options.train, self.model, self.out / "train.npz")
            held_out = tokenise(options.eval, self.model, self.out / "eval.npz")
            self.train_rows = text_rows([train[name] for name in sorted(train) if name not in UNTOUCHED], self.length)
            cut = {name: text_rows([stream], self.length, options.eval_rows) for name, stream in held_out.items()}
            self.eval_rows = {name: one for name, one in cut.items() if len(one)}
            self.trained = [name for name in self.eval_rows if name not in UNTOUCHED]
        if self.device == "cuda":
            self.train_rows = self.train_rows.to(self.device)
        self.own_rows: Rows | None = None
        self.base = load_model(self.model, torch.device(self.device), "float32").requires_grad_(False)
        kept = self.out / "base.json"
        if not kept.exists():
            measured = evaluate(self.base, self.eval_rows, self.device)
            write_json(kept, {"eval": measured, "trained": self.trained, "length": self.length})
        base = json.loads(kept.read_text())
        self.base_ecr = pooled(base["eval"], base["trained"])["ecr"]
        if self.device == "cuda":
            self.base = self.base.bfloat16()

    def text(self, kind: str) -> Rows:
        """The rows to train on."""
        if kind == "corpus":
            return self.train_rows
        if self.own_rows is None:
            self.own_rows = text_rows([np.load(self.out / "own.npy").ravel()], self.length).to(self.device)
        if kind == "own":
            return self.own_rows
        parts = [(getattr(self.train_rows, name), getattr(self.own_rows, name)) for name in ("tokens", "wanted", "real")]
        count = min(len(self.train_rows), len(self.own_rows))
        return Rows(*(torch.cat([one[:count], other[:count]]) for one, other in parts))

    def write_own_text(self, count: int, batch: int, seconds: float) -> None:
        """Keeps text of the base model, opened with the beginnings of `count` training rows."""
        if (self.out / "own.npy").exists() or count == 0:
            return
        torch.manual_seed(0)
        picks = torch.randperm(len(self.train_rows))[:count]
        openings = self.train_rows.tokens[picks.to(self.train_rows.tokens.device), :OPENING].tolist()
        written = own_text(self.base, openings, self.length, 0, batch, seconds)
        beside = self.out / "own.tmp.npy"
        np.save(beside, np.array(written, np.uint16))
        os.replace(beside, self.out / "own.npy")
        self.say(f"the base model wrote {len(written)} rows")

    def say(self, line: str) -> None:
        if not self.quiet:
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def write_json(path: Path, value: object) -> None:
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps(value) + "\n")
    os.replace(beside, path)


# --- the commands -----------------------------------------------------------------------------------------------------------------


def plan_of(options: argparse.Namespace) -> list[Run]:
    if options.runs is not None:
        listed = json.loads(options.runs.read_text())
        return [Run(**one) for one in listed]
    planned = screen(options.steps, options.kinds.split(","), options.adapters.split(","))
    return [elastic(run, options.threshold, options.rank_budget) for run in planned]


def work(options: argparse.Namespace) -> None:
    """Takes runs that nobody has taken until none is left or the time would not suffice for another."""
    bench = Bench(options)
    pace = options.seconds_per_step
    for run in plan_of(options):
        done, claim = bench.out / f"{run.name}.json", bench.out / f"{run.name}.claim"
        if done.exists() or (options.only and not re.search(options.only, run.name)):
            continue
        if time.time() + pace * run.steps > options.deadline:
            bench.say(f"no time left for {run.name}")
            continue
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        result = train(run, bench)
        pace = max(pace, result["seconds"] / run.steps)
        write_json(done, result)
        bench.say(f"{run.name} done in {result['seconds']:.0f} s")


def run(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for claim in options.out.glob("*.claim"):  # of a call that was stopped
        claim.unlink()
    options.deadline = time.time() + 60 * options.minutes
    bench = Bench(options)  # the tokens, the base model's figures and its text, once
    bench.write_own_text(options.own_rows, options.own_batch, options.own_seconds)
    del bench
    if options.processes == 1:
        work(options)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(options.deadline)]
    children = [subprocess.Popen(command) for _ in range(options.processes)]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"workers ended with {codes}")


def table(out: Path) -> list[dict[str, Any]]:
    """A row per run, with the base model's figures first."""
    base = json.loads((out / "base.json").read_text())
    domains = base["eval"]
    groups = {"trained": base["trained"], "untouched": [name for name in domains if name not in base["trained"]]}
    groups = {group: names for group, names in groups.items() if names}
    reference = {group: pooled(domains, names) for group, names in groups.items()}
    results: list[dict[str, Any]] = [{"run": {"name": "base", "adapter": "", "kind": "", "weight": 0.0}, "trained": 0, "eval": domains}]
    results += [json.loads(path.read_text()) for path in sorted(out.glob("*.json")) if path.name not in ("base.json", "report.json")]
    lines = []
    for result in results:
        now = {group: pooled(result["eval"], names) for group, names in groups.items()}
        line: dict[str, Any] = {key: result["run"].get(key) for key in ("name", "adapter", "kind", "weight", "budget", "seed", "steps")}
        line["weight"] = round(line["weight"] or 0.0, 4)
        line["trained_parameters"] = result["trained"]
        text, quality = result["run"].get("text", "corpus"), result["run"].get("quality", "distill")
        longer = text == "corpus" and result["run"].get("steps", 0) > 300
        line["group"] = line["kind"] + (", longer" if longer else "") + (", own text" if text != "corpus" else "")
        line["text"] = f"{text} {quality}"
        line["group"] += ", mean of several" if line["adapter"] == "mean" else ""
        line["distilled"] = quality == "distill"
        line["settings"] = _settings(result["run"])
        line["steps"] = f"{result['run'].get('steps', 0)} × {np.prod(result.get('batch', [0])) // 1024} Ki"
        for group, value in now.items():
            experts = len(value["chr"]) - 1
            line[f"loss_{group}"] = round(value["loss"], 4)
            line[f"perplexity_{group}_percent"] = round(100 * math.expm1(value["loss"] - reference[group]["loss"]), 2)
            line[f"ecr_{group}"] = round(float(np.mean(value["ecr"])), 4)
            for share in (25, 50, 75):
                line[f"chr{share}_{group}"] = round(value["chr"][round(share / 100 * experts)], 4)
            line[f"saving_{group}_percent"] = round(100 * (1 - equal_hit_size(reference[group]["chr"], value["chr"]) / 0.5), 1)
        lines.append(line)
    return lines


def _settings(run: dict[str, Any]) -> str:
    """What of a run is not as usual and has no column of its own."""
    usual = {"rank": 16, "lr": 1e-3, "release": 0.0, "budget": 0.0, "rank_budget": None, "threshold": None, "seed": 0}
    other = {key: run[key] for key, value in usual.items() if key in run and run[key] != value}
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in (run.get("settings", {}) | other).items() if value)


def report(options: argparse.Namespace) -> None:
    lines = table(options.out)
    write_json(options.out / "report.json", lines)
    columns = {
        "adapter": "adapter",
        "kind": "loss",
        "weight": "weight",
        "settings": "settings",
        "text": "text, quality",
        "steps": "steps × tokens",
        "trained_parameters": "trained",
        "perplexity_trained_percent": "ppl %",
        "perplexity_untouched_percent": "ppl % untouched",
        "ecr_trained": "ECR",
        "chr25_trained": "CHR 25 %",
        "chr50_trained": "CHR 50 %",
        "chr75_trained": "CHR 75 %",
        "saving_trained_percent": "saved %",
        "saving_untouched_percent": "saved % untouched",
    }
    if options.picture is not None:
        picture(options.picture, lines)
    print("| " + " | ".join(columns.values()) + " |")
    print("|" + "---|" * len(columns))
    for line in sorted(lines, key=lambda one: (one["adapter"], one["kind"], one["weight"] or 0)):
        print("| " + " | ".join(f"{line[key]:,}" if isinstance(line.get(key), int) else str(line.get(key, "")) for key in columns) + " |")


def picture(path: Path, lines: list[dict[str, Any]]) -> None:
    """What was saved against what perplexity rose, a curve per loss."""
    from cfmoe.report.plots import Line
    from cfmoe.report.plots import lines as draw

    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if (
            line["adapter"] in ("lora", "mean")
            and line["kind"] != "none"
            and line["distilled"]
            and 0 <= line["perplexity_trained_percent"] <= 2.5
        ):
            curves.setdefault(line["group"], []).append((line["perplexity_trained_percent"], line["saving_trained_percent"]))
    drawn = {name: Line(*zip(*sorted(points), strict=True)) for name, points in sorted(curves.items()) if len(points) > 0}
    draw(path, "Cache that is no longer needed for the base model's hit rate", drawn, "rise of perplexity, %", "memory saved, %")


def best(options: argparse.Namespace) -> None:
    """Prints the run that promises most at the limit, with its weight scaled to reach it, once for every seed: a file for --runs."""
    lines = {line["name"]: line for line in table(options.out) if line["kind"] not in ("", "none")}

    def promise(line: dict[str, Any]) -> float:
        # Along one frontier the saving was seen to grow with about the square root of what perplexity rises.
        return float(line["saving_trained_percent"] * math.sqrt(options.limit / max(0.1, line["perplexity_trained_percent"])))

    name = max(lines, key=lambda one: promise(lines[one]))
    run = json.loads((options.out / f"{name}.json").read_text())["run"]
    scale = min(1.7, max(0.4, 0.9 * options.limit / max(0.05, lines[name]["perplexity_trained_percent"])))
    wanted = {"weight": round(run["weight"] * scale, 4), "steps": options.steps or run["steps"]}
    runs = [{**run, **wanted, "name": f"best-{name}-seed{seed}", "seed": int(seed)} for seed in options.seeds.split(",")]
    print(json.dumps(runs, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", type=Path, required=True)
    running.add_argument("--train", type=Path, help="domain-labelled corpus, .jsonl.xz")
    running.add_argument("--eval", type=Path, help="held-out documents in the same form")
    running.add_argument("--questions", type=Path, help="instead of a corpus: .jsonl of question and answer; every 20th is held out")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--plan", choices=["screen"], default="screen")
    running.add_argument("--runs", type=Path, help="JSON list of runs instead of the plan: name, adapter, kind, weight, steps, seed, …")
    running.add_argument("--kinds", default=",".join(KINDS))
    running.add_argument("--adapters", default="lora,router,elastic")
    running.add_argument("--steps", type=int, default=300)
    running.add_argument("--batch", type=int, default=32)
    running.add_argument("--length", type=int, default=512)
    running.add_argument("--own-rows", type=int, default=0, help="rows that the base model writes, for runs with text own or both")
    running.add_argument("--own-batch", type=int, default=2048, help="rows written side by side")
    running.add_argument("--own-seconds", type=float, default=60.0, help="no further batch is written after that")
    running.add_argument("--eval-rows", type=int, default=1000, help="at most, per domain")
    running.add_argument("--threshold", type=float, default=0.35, help="of the elastic runs")
    running.add_argument("--rank-budget", type=int, help="of the elastic runs")
    running.add_argument("--minutes", type=float, default=60.0, help="no run starts that would end later")
    running.add_argument("--seconds-per-step", type=float, default=0.05, help="first guess of the pace")
    running.add_argument("--processes", type=int, default=1)
    running.add_argument("--device")
    running.add_argument("--only", help="runs whose name has this regular expression")
    running.add_argument("--keep", default="", help="names of runs whose adapters are kept, or all")
    running.add_argument("--quiet", action="store_true")
    running.add_argument("--worker", dest="deadline", type=float, help=argparse.SUPPRESS)
    reporting = commands.add_parser("report")
    reporting.add_argument("--out", type=Path, required=True)
    reporting.add_argument("--picture", type=Path, help="PNG to draw")
    between = commands.add_parser("scale")
    for name in ("--model", "--train", "--eval", "--out"):
        between.add_argument(name, type=Path, required=True)
    between.add_argument("--adapters", dest="adapters_in", required=True, help="adapter directories that runs kept, comma-separated")
    between.add_argument("--mean-only", action="store_true", help="not each of them")
    between.add_argument("--name", default="mean", help="of their mean in the results")
    between.add_argument("--scales", default="0.4,0.5,0.6,0.7,0.8,1")
    between.set_defaults(device=None, batch=32, length=512, keep="", quiet=False, questions=None, eval_rows=1000)
    choosing = commands.add_parser("best")
    choosing.add_argument("--out", type=Path, required=True)
    choosing.add_argument("--limit", type=float, default=0.5, help="percent that perplexity may rise on the trained domains")
    choosing.add_argument("--seeds", default="0,1,2")
    choosing.add_argument("--steps", type=int, help="instead of the run's own")
    options = parser.parse_args()
    if options.command == "report":
        report(options)
    elif options.command == "best":
        best(options)
    elif options.command == "scale":
        scaled(options)
    elif options.deadline is not None:
        work(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
