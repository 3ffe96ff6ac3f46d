"""From a checkpoint and data to an adapter and a merged checkpoint: what `cfmoe tune` does.

The output directory: adapter/ (what was trained), merged/ (a checkpoint directory like the one that was given, for `cfmoe compile`),
recipe.json (options), tune.json (measurements), log/ (TensorBoard) and checkpoints/ (for --resume).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from cfmoe.errors import CFMoEError, os_error
from cfmoe.tune.checkpoint import load_model, load_tokenizer, pick_device
from cfmoe.tune.data import Row, Tokens, collate, encode_documents, encode_examples, end_token, fitting, pack, read_documents, split
from cfmoe.tune.elastic import (
    ADAPTERS,
    LoraSettings,
    Scale,
    adapt,
    load_four_bit,
    plan_ranks,
    save_adapter,
    trainable_parameters,
)
from cfmoe.tune.locality import KINDS, Locality, has_predecessor
from cfmoe.tune.merged import save_merged
from cfmoe.tune.output import check_replaceable
from cfmoe.tune.own_text import OPENING, own_text
from cfmoe.tune.routers import MoELayer, RouterRecorder, find_moe_layers
from cfmoe.tune.tasks import examples, pick_task
from cfmoe.tune.trainer import LocalityTrainer, Objective, shared_experts

ProgressCallback = Callable[[str, int, int], None]

_RECIPE = "recipe.json"
_BISECTIONS = 6  # to a sixty-fourth of what was trained
_PROFILED_ROWS = 32  # of the training data, for the ECR that elastic fine-tuning goes by


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. Names and defaults are those of the command's options."""

    model: Path
    out: Path
    task: str | None = None
    data: Path | None = None
    limit: int | None = None
    held_out: float = 0.05
    max_length: int = 512
    own_text: int = 0
    # what is trained
    adapter: str = "lora"
    rank: int = 16
    alpha: float = 16.0
    rslora: bool = True
    elastic_threshold: float | None = None
    elastic_rank_budget: int | None = None
    qlora: bool = False
    # what for
    locality: str = "cache"
    locality_weight: float = 0.15
    ramp: float = 0.1
    release: float = 0.0
    quality_budget: float | None = None
    layer_weights: tuple[float, ...] | None = None
    temperature: float = 0.25
    window_decay: float = 0.9
    cache_capacity: float = 0.35
    distill: float | None = None
    aux_loss_alpha: float = 0.0
    # how
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-4
    learning_rate_floor: float = 0.0
    warmup: float = 0.05
    average: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    evaluate_every: int | None = None
    early_stopping: int | None = None
    seed: int = 0
    device: str = "auto"

    @property
    def decides_by_held_out(self) -> bool:
        """Whether held-out data decides what is kept, so that what is reported has to be measured on other rows."""
        return self.quality_budget is not None or self.early_stopping is not None

    @property
    def distill_share(self) -> float:
        """By default 1 for a text, whose words need not be learnt, and 0 for a task, whose answers shall be."""
        if self.distill is not None:
            return self.distill
        return 1.0 if self.task is None and self.locality != "none" else 0.0

    def problems(self) -> list[str]:
        """Every reason why this recipe cannot be followed, or would ignore something that it says."""
        found = []
        if (self.task is None) == (self.data is None) and self.task is None:
            found.append("neither --task nor --data says what to train on")
        if self.adapter not in ADAPTERS:
            found.append(f"--adapter {self.adapter} is none of {', '.join(ADAPTERS)}")
        elif self.adapter != "lora":
            given = {"--elastic-threshold": self.elastic_threshold, "--elastic-rank-budget": self.elastic_rank_budget}
            found += [f"{name} is for --adapter lora only" for name, value in given.items() if value is not None]
            found += ["--qlora is for --adapter lora only"] if self.qlora else []
        if self.locality not in ("none", *KINDS):
            found.append(f"--locality {self.locality} is none of {', '.join(('none', *KINDS))}")
        if self.locality == "none" and self.quality_budget is not None:
            found.append("--quality-budget does nothing with --locality none")
        if self.locality == "none" and self.distill == 1:
            found.append("--distill 1 with --locality none would train the model to be what it is")
        if self.own_text and self.distill_share < 1:
            found.append("--own-text teaches nothing but what the base model says, so it needs --distill 1")
        if self.early_stopping is not None and self.evaluate_every is None:
            found.append("--early-stopping needs --evaluate-every")
        if self.early_stopping is not None and self.average:
            found.append("--early-stopping keeps one checkpoint and --average the mean of the last steps; choose one of them")
        return found


def tune(recipe: Recipe, force: bool = False, resume: bool = False, progress: ProgressCallback | None = None) -> dict[str, Any] | None:
    """Follows `recipe`; returns what tune.json holds, in the first process. Raises CFMoEError for what the user can mend.

    Started by torchrun or accelerate, every process calls it and the first one writes.
    """
    if problems := recipe.problems():
        raise CFMoEError("; ".join(problems))
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        _prepare_output(recipe, force, resume)
    transformers.set_seed(recipe.seed)  # adapters start at random
    device = pick_device(recipe.device)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # by which the first process alone would have the weights, until training
    arguments = training_arguments(recipe, device)  # starts the process group, which decides each process's device
    model = _load(recipe, arguments)
    layers = find_moe_layers(model)
    train, held, pad = prepare_data(recipe, model)
    if recipe.own_text:
        train = own_rows(recipe, model, train, pad, arguments.world_size, progress)
    _set_steps(recipe, arguments, len(train))
    ecr = profile_rows(model, layers, train[:_PROFILED_ROWS], pad, recipe.max_length)
    ranks = None
    if recipe.adapter == "lora":
        ranks = plan_ranks(ecr, recipe.rank, recipe.elastic_threshold, recipe.elastic_rank_budget)
    model = adapt(model, [layer.router_name for layer in layers], recipe.adapter, ranks, LoraSettings(recipe.alpha, recipe.rslora))
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        name = "activation_checkpointing_enable" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing_enable"
        getattr(model, name)({"use_reentrant": False})
    objective = _objective(recipe, layers)
    base = None
    if objective.needs_base and recipe.adapter != "lora":
        base = load_model(recipe.model, arguments.device, "bfloat16" if recipe.bf16 else "float32").requires_grad_(False)
    validation, reported = divide(held) if recipe.decides_by_held_out else (held, None)
    callbacks = _callbacks(recipe, progress, first)
    trainer = LocalityTrainer(
        model, arguments, train, validation, pad, recipe.max_length, objective, base, callbacks, average=recipe.average
    )
    if recipe.quality_budget is not None and trainer.sharded:
        raise CFMoEError("--quality-budget scales whole parameters back, and FSDP and DeepSpeed split them; leave it out, or use DDP")
    trainer.remove_callback(transformers.PrinterCallback)  # standard output is for the result
    decided_by = {} if reported is None else {"before": trainer.evaluate()["eval_loss"]}
    before = trainer.evaluate(reported)
    ecr_before = trainer.ecr_per_layer
    scale = None if recipe.quality_budget is None else Scale(model)
    result = trainer.train(resume_from_checkpoint=resume or None)
    share = 1.0
    if scale is not None and recipe.quality_budget is not None:
        share = hold_budget(trainer, scale, decided_by["before"] + math.log1p(recipe.quality_budget))
    if reported is not None:
        decided_by["after"] = trainer.evaluate()["eval_loss"]
    after = trainer.evaluate(reported)
    trained, everything = trainable_parameters(model)
    summary = {
        "recipe": _options(recipe),
        "rows": {"train": len(train), "held_out": len(held if reported is None else reported)},
        "trained_parameters": trained,
        "model_parameters": everything,
        "ranks": ranks,
        "ecr_profiled_per_layer": ecr,
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "adapter_scale": share,
        "seconds": result.metrics["train_runtime"],
        "processes": arguments.world_size,
        "distributed": trainer.accelerator.distributed_type.value,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "before": {key.removeprefix("eval_"): value for key, value in before.items()} | {"ecr_per_layer": ecr_before},
        "after": {key.removeprefix("eval_"): value for key, value in after.items()} | {"ecr_per_layer": trainer.ecr_per_layer},
    }
    if reported is not None:
        summary["rows"]["validation"] = len(validation)
        summary["validation_loss"] = decided_by
    _write_results(recipe, trainer, summary, first)
    return summary if first else None


# --- the parts --------------------------------------------------------------------------------------------------------------------


def _prepare_output(recipe: Recipe, force: bool, resume: bool) -> None:
    """Makes the output directory with recipe.json in it; for `resume` checks that it was made for the same recipe."""
    out, options = recipe.out, _options(recipe)
    try:
        if not resume:
            check_replaceable(out, force, _RECIPE)
            if out.exists():
                shutil.rmtree(out)
            out.mkdir(parents=True)
            (out / _RECIPE).write_text(json.dumps(options, indent=2) + "\n")
            return
        if not any((out / "checkpoints").glob("checkpoint-*")):
            raise CFMoEError(f"{out} has no checkpoints to resume from; leave out --resume")
        before = json.loads((out / _RECIPE).read_text())
    except OSError as error:
        raise os_error(error, out, "write") from error
    except ValueError as error:
        raise CFMoEError(f"{out / _RECIPE} is no JSON: {error}; start anew without --resume") from error
    if other := [name for name, value in options.items() if name != "out" and before.get(name) != value]:
        name = other[0]
        raise CFMoEError(f"--resume goes on with the same options, and {name} was {before.get(name)}, not {options[name]}; give the same")


def _options(recipe: Recipe) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(recipe).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def training_arguments(recipe: Recipe, device: torch.device) -> transformers.TrainingArguments:
    """The Trainer's settings; the number of steps is set once the data is known."""
    every = recipe.evaluate_every
    return transformers.TrainingArguments(
        output_dir=str(recipe.out / "checkpoints"),
        use_cpu=device.type == "cpu",
        max_steps=recipe.steps or 1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.learning_rate_floor},
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=recipe.bf16,
        eval_strategy="no" if every is None else "steps",
        eval_steps=every,
        save_strategy="no" if every is None else "steps",
        save_steps=every or 500,
        save_total_limit=2,
        load_best_model_at_end=recipe.early_stopping is not None,
        metric_for_best_model="objective",
        greater_is_better=False,
        logging_steps=1 if (recipe.steps or 100) < 50 else 10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
    )


def _load(recipe: Recipe, arguments: transformers.TrainingArguments) -> Any:
    # Full fine-tuning keeps its weights in float32 and computes in bfloat16; an adapter's frozen base need not, except that
    # FSDP shards parameters of one type.
    half = recipe.bf16 and recipe.adapter != "full" and not _fsdp()
    if recipe.qlora:
        return load_four_bit(recipe.model, torch.bfloat16 if recipe.bf16 else torch.float32)
    with _undivided(arguments):
        return load_model(recipe.model, arguments.device, "bfloat16" if half else "float32")


def _fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


@contextmanager
def _undivided(arguments: transformers.TrainingArguments) -> Iterator[None]:
    """Lets a model be loaded whole: ZeRO-3 would divide it among the processes at once, and it is measured before that."""
    plugin = arguments.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def prepare_data(recipe: Recipe, model: Any) -> tuple[list[Row], list[Row], int]:
    """Packed training rows, held-out rows, and the token that fills up a row."""
    tokenizer = load_tokenizer(recipe.model)
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.max_length > limit:
        raise CFMoEError(f"--max-length {recipe.max_length} is longer than the model's context of {limit} tokens; use at most {limit}")
    end = end_token(model.config, tokenizer)
    if recipe.task is None:
        assert recipe.data is not None
        parts = split(read_documents(recipe.data, recipe.limit), recipe.held_out, recipe.seed, lambda one: one.domain)
        if len(parts[0]) + len(parts[1]) == 1:  # one long text: hold out pieces of it
            pieces = encode_documents(parts[0], tokenizer, end, recipe.max_length)
            sequences = split(pieces, recipe.held_out, recipe.seed)
        else:
            first, second = (encode_documents(part, tokenizer, end, recipe.max_length) if part else [] for part in parts)
            sequences = (first, second)
    else:
        task = pick_task(recipe.task)
        fit = fitting(examples(task, recipe.data, recipe.limit, "train"), tokenizer, recipe.max_length)
        found = split(fit, recipe.held_out, recipe.seed)
        first, second = (encode_examples(part, tokenizer, end, recipe.max_length) if part else [] for part in found)
        sequences = (first, second)
    train, held = (pack(part, recipe.max_length, recipe.seed) for part in sequences)
    if not held:
        raise CFMoEError(f"--held-out {recipe.held_out} of the data leaves nothing to measure on; use a larger share or more data")
    pad = config.pad_token_id
    return train, held, pad if isinstance(pad, int) and pad >= 0 else end or 0


def own_rows(
    recipe: Recipe, model: Any, rows: Sequence[Row], pad: int, processes: int, progress: ProgressCallback | None = None
) -> list[Row]:
    """Rows that the model writes itself, opened with the beginnings of sequences of `rows`; the first process writes them for all."""
    openings = [one.ids[:OPENING] for row in rows for one in row if len(one.ids) >= OPENING]
    if not openings:
        raise CFMoEError(f"--own-text needs texts of at least {OPENING} tokens to begin with; use longer ones")
    chosen = random.Random(recipe.seed).choices(openings, k=recipe.own_text)
    written: list[Any] = [None]
    if int(os.environ.get("RANK", "0")) == 0:
        batch = 64 if model.device.type == "cpu" else 1024
        written = [own_text(model, chosen, recipe.max_length, pad, batch, progress=progress)]
    if processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(written)
    return [[Tokens(ids, 1)] for ids in written[0]]


def _set_steps(recipe: Recipe, arguments: transformers.TrainingArguments, rows: int) -> None:
    per_step = recipe.batch_size * arguments.world_size * recipe.accumulate
    if rows < recipe.batch_size * arguments.world_size:
        raise CFMoEError(
            f"the data fills {rows} rows of {recipe.max_length} tokens, fewer than a batch of {recipe.batch_size} for each of "
            f"{arguments.world_size} processes; use a smaller --batch-size or --max-length, or more data"
        )
    arguments.max_steps = recipe.steps or max(1, round(recipe.epochs * rows / per_step))
    arguments.warmup_steps = round(recipe.warmup * arguments.max_steps)


@torch.no_grad()
def profile_rows(model: Any, layers: Sequence[MoELayer], rows: Sequence[Row], pad: int, length: int) -> list[float]:
    """The ECR of every MoE layer over `rows`."""
    shared, pairs = torch.zeros(len(layers)), 0
    model.eval()
    with RouterRecorder(layers) as recorder:
        for row in rows:
            batch = {name: value.to(model.device) for name, value in collate([row], pad, length).items()}
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            shared += shared_experts(recorder.ids, batch["segments"]).cpu()
            pairs += int(has_predecessor(batch["segments"]).sum())
    return (shared / max(1, pairs)).tolist()


def divide(held: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(validation, reported): every second held-out row to decide by, and the others, which nothing was chosen for."""
    if len(held) < 2:
        raise CFMoEError(
            "--quality-budget and --early-stopping decide by held-out data and report on other, and only one row of it is there; "
            "use a larger --held-out, a smaller --max-length or more data"
        )
    return list(held[1::2]), list(held[::2])


def hold_budget(trainer: LocalityTrainer, scale: Scale, limit: float) -> float:
    """Scales back what was trained until the validation loss is at most `limit`, by bisection; the share that is left.

    The weight that was chosen in training goes by the training data, which the model may know by heart.
    """
    scale.keep()
    if trainer.evaluate()["eval_loss"] <= limit:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        scale.set(middle)
        low, high = (middle, high) if trainer.evaluate()["eval_loss"] <= limit else (low, middle)
    scale.set(low)
    return low


def _objective(recipe: Recipe, layers: Sequence[MoELayer]) -> Objective:
    if recipe.layer_weights is not None and len(recipe.layer_weights) != len(layers):
        raise CFMoEError(
            f"--layer-weights has {len(recipe.layer_weights)} values, but the model has {len(layers)} MoE layers; give one each"
        )
    kinds = {(layer.num_experts, layer.top_k) for layer in layers}
    if len(kinds) > 1:
        raise CFMoEError(f"the model's MoE layers differ (experts, top-k: {sorted(kinds)}); tuning needs layers of one kind")
    loss = None
    if recipe.locality != "none":
        loss = Locality(recipe.locality, layers[0].top_k, recipe.temperature, recipe.window_decay, recipe.cache_capacity)
    return Objective(
        locality=loss,
        weight=recipe.locality_weight,
        ramp=recipe.ramp,
        release=recipe.release,
        budget=recipe.quality_budget,
        distill=recipe.distill_share,
        aux_alpha=recipe.aux_loss_alpha,
        layer_weights=recipe.layer_weights,
    )


class _Progress(transformers.TrainerCallback):
    def __init__(self, report: ProgressCallback) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.report("training", state.global_step, state.max_steps)


def _callbacks(recipe: Recipe, progress: ProgressCallback | None, first: bool) -> list[transformers.TrainerCallback]:
    found: list[transformers.TrainerCallback] = []
    if first:
        from transformers.integrations import TensorBoardCallback

        board = TensorBoardCallback()
        board.logging_dir = str(recipe.out / "log")
        found.append(board)
    if progress is not None and first:
        found.append(_Progress(progress))
    if recipe.early_stopping is not None:
        found.append(transformers.EarlyStoppingCallback(recipe.early_stopping))
    return found


# --- results ----------------------------------------------------------------------------------------------------------------------


def _write_results(recipe: Recipe, trainer: LocalityTrainer, summary: dict[str, Any], first: bool) -> None:
    adapter = recipe.out / "adapter"
    if trainer.sharded:
        trainer.save_model(str(adapter))
        if first:
            (adapter / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here would open
    elif first:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), adapter)
    trainer.accelerator.wait_for_everyone()
    if first:
        with _undivided(trainer.args):
            save_merged(recipe.model, adapter, recipe.out / "merged")
        beside = recipe.out / "tune.json.tmp"
        beside.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(beside, recipe.out / "tune.json")
    trainer.accelerator.wait_for_everyone()
