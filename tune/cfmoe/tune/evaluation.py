"""What `cfmoe evaluate` does: data, the models one after the other, the processes' shares, and the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from cfmoe.errors import CFMoEError
from cfmoe.tune.checkpoint import load_model, load_tokenizer, pick_device
from cfmoe.tune.data import encode_documents, encode_examples, end_token, fitting, read_documents
from cfmoe.tune.elastic import load_adapter, merge
from cfmoe.tune.evaluate import Evaluation, ProgressCallback, Scored, evaluate
from cfmoe.tune.evaluation_report import MARK, write
from cfmoe.tune.output import check_replaceable
from cfmoe.tune.tasks import Example, examples, pick_task

BASE, TUNED = "base", "tuned"


def run(
    model: Path,
    adapter: Path | None,
    task: str | None,
    data: Path | None,
    *,
    out: Path,
    limit: int | None = None,
    max_length: int = 512,
    new_tokens: int | None = None,
    policies: Sequence[str] = (),
    sizes: Sequence[str] = ("25%", "50%", "75%"),
    batch_size: int = 8,
    device: str = "auto",
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Evaluation] | None:
    """Evaluates `model` and, where given, `adapter`, and writes `out`; returns the evaluations, None but in the first process.

    Raises CFMoEError for what the user can mend.
    """
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if process == 0:
        check_replaceable(out, force, MARK)
    documents = read_documents(data, limit) if task is None and data is not None else []
    every = [] if task is None else examples(pick_task(task), data, limit)
    place = pick_device(device)
    gather = None
    if processes > 1:
        from accelerate import PartialState
        from accelerate.utils import gather_object

        state = PartialState(cpu=place.type == "cpu")
        place = state.device

        def gather(scored: list[Scored]) -> list[Scored]:
            return list(gather_object(scored))

    loaded = load_model(model, place)
    tokenizer = load_tokenizer(model)
    end = end_token(loaded.config, tokenizer)
    pad = loaded.config.get_text_config().pad_token_id
    pad = pad if isinstance(pad, int) and pad >= 0 else end or 0
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and max_length > context:
        raise CFMoEError(f"--max-length {max_length} is longer than the model's context of {context} tokens; use at most {context}")
    chosen: list[Example] | None = None
    if task is None:
        sequences = encode_documents(documents, tokenizer, end, max_length)
    else:
        chosen = fitting(every, tokenizer, max_length)
        sequences = encode_examples(chosen, tokenizer, end, max_length)
        new_tokens = pick_task(task).new_tokens if new_tokens is None else new_tokens
    found: dict[str, Evaluation] = {}
    for name in (BASE, TUNED) if adapter is not None else (BASE,):
        if name == TUNED and adapter is not None:
            loaded = load_model(adapter, place) if (adapter / "config.json").is_file() else merge(load_adapter(loaded, adapter)).eval()
        one = evaluate(
            loaded,
            sequences,
            chosen,
            tokenizer,
            end=end,
            pad=pad,
            new_tokens=new_tokens or 0,
            batch_size=batch_size,
            policies=policies,
            sizes=sizes,
            shard=(process, processes),
            gather=gather,
            progress=None if progress is None else _named(progress, name),
        )
        if one is not None:
            found[name] = one
    if process:
        return None
    facts = {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "task": task,
        "data": None if data is None else str(data),
    }
    write(out, found, sequences, chosen, facts | {"sequences": len(sequences), "max_length": max_length}, force)
    return found


def _named(progress: ProgressCallback, name: str) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)
