"""transformers' Trainer with CFMoE's loss: quality + weight · locality + alpha · load balance, all over the whole batch's tokens.

The whole batch is what one step of the optimiser sees: over processes and accumulated micro-batches. Every term is a sum over tokens
divided by a count that all processes share, so that splitting a batch does not change its loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from cfmoe.errors import CFMoEError
from cfmoe.tune.average import TailAverage
from cfmoe.tune.data import IGNORED, Row, collate
from cfmoe.tune.elastic import TRAINED, load_trained, trained_parameters
from cfmoe.tune.locality import PADDING, Locality, has_predecessor, locality_loss
from cfmoe.tune.routers import RouterRecorder
from cfmoe.tune.schedule import QualityBudget, weight_at

_STATE = "locality_state.json"
_MEAN = "mean.safetensors"


@dataclass(frozen=True)
class Objective:
    """What is trained for. `locality` None is plain fine-tuning."""

    locality: Locality | None = None
    weight: float = 0.0
    ramp: float = 0.1
    release: float = 0.0
    budget: float | None = None  # of perplexity; it chooses the weight
    distill: float = 0.0  # share of the divergence from the base model in the quality term; the rest is the data's cross-entropy
    aux_alpha: float = 0.0
    layer_weights: tuple[float, ...] | None = None

    @property
    def needs_base(self) -> bool:
        return self.distill > 0 or self.budget is not None


def wanted_positions(labels: Tensor) -> Tensor:  # (batch, seq) → (batch, seq - 1) bool
    """Where the next token is to be predicted."""
    return labels[:, 1:] != IGNORED


def balance_loss(
    logits: Sequence[Tensor],  # per layer (batch * seq, experts)
    ids: Sequence[Tensor],  # per layer (batch * seq, top_k)
    real: Tensor,  # (batch * seq,) bool, False for padding
    total: Callable[[Tensor], Tensor],  # sums a tensor over the processes
    tokens: Tensor | float,  # real tokens that this step of the optimiser sees, of all processes
) -> Tensor:
    """The mean over layers of E · Σ fᵢ Pᵢ, 1 where all experts are used alike: Fedus et al., Switch Transformers, arXiv:2101.03961, eq. 4.

    fᵢ is the share of choices that fell on expert i, over all processes rather than each alone (Qiu et al., arXiv:2501.11873), and
    carries no gradient; Pᵢ is the router's mean probability of i.
    """
    losses = []
    for scores, chosen in zip(logits, ids, strict=True):
        experts = scores.shape[-1]
        counts = total(torch.bincount(chosen[real].flatten(), minlength=experts).to(scores.device, torch.float32))
        probability = functional.softmax(scores[real].float(), dim=-1).sum(0) / tokens
        losses.append(experts * (counts / counts.sum() * probability).sum())
    return torch.stack(losses).mean()


def shared_experts(ids: Sequence[Tensor], segments: Tensor) -> Tensor:  # (layers,)
    """Per layer the sum over consecutive tokens of |E ∩ E'| / k."""
    pairs = has_predecessor(segments)[:, 1:]
    stacked = torch.stack(list(ids)).view(len(ids), *segments.shape, -1)
    same = (stacked[:, :, 1:, :, None] == stacked[:, :, :-1, None, :]).any(-1).float().mean(-1)
    return (same * pairs).sum((1, 2))


class LocalityTrainer(transformers.Trainer):
    """Trains `model` on packed rows. `base` is the frozen base model where no adapter can be switched off to give it back.

    With `average`, a share of the steps, `train` ends with the mean of what was trained over the last ones.
    Each log adds quality, locality, its weight and ECR; `evaluate` measures held-out loss and ECR exactly, each row once.
    """

    control: transformers.TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        train_rows: Sequence[Row],
        held_rows: Sequence[Row],
        pad: int,
        row_length: int,
        objective: Objective,
        base: nn.Module | None = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        average: float = 0.0,
    ) -> None:
        self.objective = objective
        self.base = base
        self.held_rows = held_rows
        self.pad, self.row_length = pad, row_length
        self.quality_budget = None if objective.budget is None else QualityBudget(objective.budget)
        self.recorder = RouterRecorder(model)
        self.recorder.__enter__()  # for the trainer's life: what torch.compile compiles has to see the hooks

        def collator(rows: list[Row]) -> dict[str, Tensor]:
            return collate(rows, pad, row_length)

        args.remove_unused_columns = False
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=list(train_rows),
            eval_dataset=list(held_rows),
            callbacks=callbacks,
        )
        self.loss_is_scaled_for_ga = True
        if self.args.n_gpu > 1:
            raise CFMoEError(f"{self.args.n_gpu} GPUs in one process are not supported; start one process for each with torchrun")
        self.average = TailAverage(model, average, args.max_steps) if average else None
        if self.average is not None and self.is_deepspeed_enabled:
            raise CFMoEError("--average does not reach the parameters that DeepSpeed keeps; leave it out, or use DDP or FSDP")
        self._fresh = False  # whether `_excess` holds a step's
        self._forget()

    # --- the loss -----------------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """(3,): predicted tokens, consecutive pairs and real tokens of the whole batch."""
        counts = torch.zeros(3, dtype=torch.float64)
        for batch in batch_samples:
            segments = batch["segments"]
            counts += torch.stack(
                [wanted_positions(batch["labels"]).sum(), has_predecessor(segments).sum(), (segments != PADDING).sum()]
            ).cpu()
        return self._total(counts.to(device, torch.float32)).clamp_min(1)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """After every step; the checkpoint that may be written here holds the weight of the next one."""
        if self.quality_budget is not None and self._fresh:
            self.quality_budget.update(self._total(self._excess).item())
            self._excess.zero_()
            self._fresh = False
        if self.average is not None:
            self.average.update(self.state.global_step)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> transformers.trainer_utils.TrainOutput:
        result = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.apply()
        return result

    def locality_weight(self) -> float:
        """λ of the current step."""
        if self.objective.locality is None:
            return 0.0
        weight = self.objective.weight if self.quality_budget is None else self.quality_budget.weight
        return weight_at(self.state.global_step, self.state.max_steps, weight, self.objective.ramp, self.objective.release)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], inputs["labels"].device)
        tokens, pairs, real_tokens = num_items_in_batch.unbind()
        labels, segments = inputs["labels"], inputs["segments"]
        fed = {name: inputs[name] for name in ("input_ids", "position_ids")}
        where = wanted_positions(labels)
        base = functional.log_softmax(self._base_logits(model, fed)[where], dim=-1) if self.objective.needs_base else None
        own = functional.log_softmax(model(**fed, use_cache=False).logits[:, :-1][where].float(), dim=-1)
        target = labels[:, 1:][where][:, None]
        loss = -own.gather(-1, target).sum() / tokens
        quality = loss
        if base is not None:
            # By the data and not by the divergence: a model may differ from the base and predict the data as well.
            self._excess += loss.detach() + base.gather(-1, target).sum() / tokens
            self._fresh = True
            if self.objective.distill:
                # KL(base ‖ tuned) at temperature 1: Hinton et al., Distilling the knowledge in a neural network, arXiv:1503.02531
                divergence = (base.exp() * (base - own)).sum() / tokens
                quality = self.objective.distill * divergence + (1 - self.objective.distill) * loss
        balance = quality.new_zeros(())
        ids = self.recorder.ids
        weight = self.locality_weight()
        local = self._locality(segments, pairs)
        if self.objective.aux_alpha:
            balance = balance_loss(self.recorder.logits, ids, (segments != PADDING).flatten(), self._total, real_tokens)
        self._note(quality, local, balance, (shared_experts(ids, segments) / pairs).mean())
        total = quality + weight * local + self.objective.aux_alpha * balance
        self.recorder.clear()
        return total * self.accelerator.num_processes  # gradients are averaged over the processes, but the sum is wanted

    def _locality(self, segments: Tensor, pairs: Tensor | float) -> Tensor:
        """The locality loss of the pass just recorded, a sum over pairs divided by `pairs`; 0 without one."""
        if self.objective.locality is None:
            return torch.zeros((), device=segments.device)
        given = self.objective.layer_weights
        weights = None if given is None else torch.tensor(given, device=segments.device)
        return locality_loss(self.objective.locality, self.recorder.logits, segments, self.recorder.ids, weights, pairs)

    @torch.no_grad()
    def _base_logits(self, model: nn.Module, fed: dict[str, Tensor]) -> Tensor:  # (batch, seq - 1, vocabulary) float32
        """What the base model predicts: `base`, or the model with its adapter switched off."""
        if self.base is not None:
            return self.base(**fed, use_cache=False).logits[:, :-1].float()
        adapted = self.accelerator.unwrap_model(model)
        adapted.eval()
        with adapted.disable_adapter():
            logits = model(**fed, use_cache=False).logits
        adapted.train()
        return logits[:, :-1].float()

    # --- numbers ------------------------------------------------------------------------------------------------------------------

    def _total(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return self.accelerator.reduce(value, reduction="sum") if self.accelerator.num_processes > 1 else value

    def _forget(self) -> None:
        device = self.args.device
        self._sums = torch.zeros(4, device=device)
        self._excess = torch.zeros((), device=device)
        self._fresh = False
        self._noted_since = self.state.global_step

    def _note(self, *values: Tensor) -> None:
        self._sums += torch.stack([value.detach().float() for value in values])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - self._noted_since
        if "loss" in logs and steps > 0:
            quality, local, balance, ecr = (self._total(self._sums) / steps).tolist()
            if not all(map(torch.isfinite, torch.tensor([quality, local, balance]))):
                raise CFMoEError(f"the loss is no number at step {self.state.global_step}; use a lower --learning-rate")
            logs |= {"quality": quality, "locality": local, "locality_weight": self.locality_weight(), "ecr": ecr}
            if self.objective.aux_alpha:
                logs["load_balance"] = balance
            self._sums.zero_()
            self._noted_since = self.state.global_step
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Sequence[Row] | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out nats per token, perplexity and ECR, overall and the loss per domain; each process measures its share of the rows.

        Of rows that are given, no log and no callback hears: nothing is to be decided by them.
        """
        rows = self.held_rows if eval_dataset is None else eval_dataset
        domains = sorted({one.domain for row in rows for one in row})
        layers = len(self.recorder.layers)
        sums = torch.zeros(2 * len(domains) + 2 + layers, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model
        model.eval()
        step = self.args.per_device_eval_batch_size
        share = step * self.accelerator.num_processes
        for start in range(0, len(rows), share):
            at = start + step * self.accelerator.process_index
            part = list(rows[at : at + step])
            sums += self._measure(model, part or list(rows[:1]), domains) * bool(part)  # a share may be empty, its forward pass is not
        model.train()
        sums = self._total(sums)
        nats, counts = sums[: len(domains)], sums[len(domains) : 2 * len(domains)]
        loss = (nats.sum() / counts.sum()).item()
        pairs, local = sums[2 * len(domains)].clamp_min(1), sums[2 * len(domains) + 1]
        ecr = sums[2 * len(domains) + 2 :] / pairs
        weight = self.objective.weight if self.quality_budget is None else self.quality_budget.weight
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": torch.tensor(loss).exp().item()}
        metrics |= {f"{metric_key_prefix}_ecr": ecr.mean().item()}
        if self.objective.locality is not None:
            metrics[f"{metric_key_prefix}_locality"] = (local / pairs).item()
        # What early stopping goes by: with the loss alone the best model would be that before locality was asked for.
        metrics[f"{metric_key_prefix}_objective"] = loss + weight * (local / pairs).item()
        if domains != [""]:
            metrics |= {f"{metric_key_prefix}_loss_{domain}": (nats[i] / counts[i]).item() for i, domain in enumerate(domains)}
        self.ecr_per_layer: list[float] = ecr.tolist()
        if eval_dataset is None:
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, model: nn.Module, rows: list[Row], domains: list[str]) -> Tensor:
        """Sums over `rows`: nats per domain, predicted tokens per domain, pairs, locality, shared experts per layer."""
        batch = {name: value.to(self.args.device) for name, value in collate(rows, self.pad, self.row_length).items()}
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        where = wanted_positions(batch["labels"])
        nats = functional.cross_entropy(logits[:, :-1][where].float(), batch["labels"][:, 1:][where], reduction="none").double()
        most = max(len(row) for row in rows)
        numbers = torch.tensor([[domains.index(one.domain) for one in row] + [0] * (most - len(row)) for row in rows])
        domain = numbers.to(nats.device).gather(1, batch["segments"][:, 1:].clamp_min(0))[where]
        of_domain = torch.zeros(len(domains), dtype=torch.float64, device=nats.device)
        pairs = has_predecessor(batch["segments"]).sum().double()[None]
        shared = shared_experts(self.recorder.ids, batch["segments"]).double()
        local = self._locality(batch["segments"], 1.0).double()[None]
        counts = torch.ones_like(nats)
        sums = [of_domain.index_add(0, domain, nats), of_domain.index_add(0, domain, counts), pairs, local, shared]
        self.recorder.clear()
        return torch.cat(sums)

    # --- checkpoints --------------------------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The trained parameters under their own names. (What save_pretrained writes has the hub's names, and would not load back.)"""
        if self.sharded:
            super()._save(output_dir, state_dict)
            return
        from safetensors.torch import save_file

        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(trained_parameters(self.model), directory / TRAINED)
        state: dict[str, float | None] = {} if self.quality_budget is None else self.quality_budget.state_dict()
        if self.average is not None:
            save_file(self.average.state_dict(), directory / _MEAN)
            state["averaged"] = self.average.count
        (directory / _STATE).write_text(json.dumps(state) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            if self.average is not None:
                raise CFMoEError("--resume with --average needs whole parameters, and FSDP splits them; start anew, or leave out --average")
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        checkpoint = Path(resume_from_checkpoint)
        load_trained(self.model, checkpoint / TRAINED)
        state = json.loads((checkpoint / _STATE).read_text())
        if self.quality_budget is not None:
            self.quality_budget.load_state_dict(state)
        if self.average is not None:
            from safetensors.torch import load_file

            self.average.load_state_dict(load_file(checkpoint / _MEAN), int(state["averaged"]))
        self._forget()

    def _load_best_model(self) -> None:
        if self.sharded:
            super()._load_best_model()
        elif self.state.best_model_checkpoint is not None:
            load_trained(self.model, Path(self.state.best_model_checkpoint) / TRAINED)
