"""The task sets: their rows from local files or the Hugging Face hub, as prompts, answers and how an answer is judged."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from cfmoe.errors import CFMoEError, os_error
from cfmoe.measure.text import decode_utf8
from cfmoe.tune import templates
from cfmoe.tune.answers import LETTERS, parse_boolean, parse_choice, parse_number, same_number

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt, the reference answer that follows it after a space, and what of the answer is right or wrong."""

    prompt: str
    answer: str
    label: str  # what `Input` is called in tables: the question, the title, …
    gold: str | bool | Fraction | None = None  # None where the answer is a text
    options: tuple[str, ...] = ()

    def is_right(self, written: str) -> bool | None:
        """Whether what a model wrote gives the right answer; None where the answer is a text, which ROUGE compares."""
        if self.gold is None:
            return None
        if isinstance(self.gold, bool):
            return parse_boolean(written) is self.gold
        if isinstance(self.gold, str):
            return parse_choice(written, self.options) == self.gold
        return same_number(parse_number(written), self.gold)


@dataclass(frozen=True)
class Hub:
    """Where a task set is on the hub, and its rows in the fields of the local files."""

    path: str
    name: str | None
    held_out: str  # the split with answers that is not for training
    fields: Callable[[Row], Row]


@dataclass(frozen=True)
class Task:
    name: str
    metric: Literal["accuracy", "rouge"]
    new_tokens: int  # an answer's length at most
    example: Callable[[Row], Example]
    hub: Hub | None


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise CFMoEError(f'has no field "{field}" that is a text')
    return value.strip()


def _texts(row: Row, field: str) -> tuple[str, ...]:
    value = row.get(field)
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS) or not all(isinstance(one, str) for one in value):
        raise CFMoEError(f'has no field "{field}" that is a list of 2 to {len(LETTERS)} texts')
    return tuple(one.strip() for one in value)


def _letter(row: Row, options: tuple[str, ...]) -> str:
    """The right option's letter; files give it as a letter or as a number counted from 1."""
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 1 <= answer <= len(options):
        return LETTERS[answer - 1]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in LETTERS[: len(options)]:
        return answer.strip().upper()
    raise CFMoEError(
        f'has an "answer" {answer!r} that is neither a letter up to {LETTERS[len(options) - 1]} nor a number up to {len(options)}'
    )


def _listed(options: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def _choice(template: str, row: Row, question: str, options: tuple[str, ...], **fields: str) -> Example:
    gold = _letter(row, options)
    prompt = template.format(question=question, options=_listed(options), **fields)
    return Example(prompt, f"{gold}) {options[LETTERS.index(gold)]}", question, gold, options)


def _worked_choice(row: Row, options: tuple[str, ...]) -> Example:
    question, gold = _text(row, "question"), _letter(row, options)
    prompt = templates.CHOICE_WITH_WORKING.format(question=question, options=_listed(options))
    return Example(prompt, f"{_text(row, 'rationale')}\nThe answer is {gold}.", question, gold, options)


def _number(row: Row, question: str, working: str, result: str) -> Example:
    gold = parse_number(result)
    if gold is None:
        raise CFMoEError(f"has an answer {result!r} without a number")
    return Example(templates.WORD_PROBLEM.format(question=question), f"{working}\n#### {result}", question, gold)


def _instruction(row: Row) -> Example:
    instruction, extra = _text(row, "instruction"), _text({"input": "", **row}, "input")
    template = templates.INSTRUCTION_WITH_INPUT if extra else templates.INSTRUCTION
    return Example(template.format(instruction=instruction, input=extra), _text(row, "output"), instruction)


def _aqua(row: Row) -> Example:
    return _worked_choice(row, tuple(re.sub(r"^\(?[A-J]\s?\)\s*", "", option) for option in _texts(row, "options")))


def _mathqa(row: Row) -> Example:
    """Options are "a ) …, b ) …", in some rows as a written-out list: "['a ) …', 'b ) …']"."""
    text = _text(row, "options")
    if text.startswith("[") and text.endswith("]"):
        text = ", ".join(re.split(r"""['"], ['"]""", text[1:-1].strip("'\"")))
    options = tuple(part.strip() for part in re.split(r"(?:^|,)\s*[a-e] \)\s*", text) if part.strip())
    if len(options) < 2:
        raise CFMoEError(f'has "options" {text!r} that are not of the form "a ) …, b ) …"')
    return _worked_choice(row, options)


def _boolq(row: Row) -> Example:
    question, answer = _text(row, "question"), str(row.get("answer")).strip().lower()
    if answer not in ("true", "false"):
        raise CFMoEError(f'has an "answer" {row.get("answer")!r} that is neither true nor false')
    passage = row.get("passage")
    template = templates.YES_OR_NO_WITH_PASSAGE if isinstance(passage, str) and passage.strip() else templates.YES_OR_NO
    return Example(template.format(question=question, passage=passage), "yes" if answer == "true" else "no", question, answer == "true")


def _gsm8k(row: Row) -> Example:
    working, mark, result = re.sub(r"<<[^<>]*>>", "", _text(row, "answer")).rpartition("####")
    if not mark:
        raise CFMoEError('has an "answer" that does not end in "#### number"')
    return _number(row, _text(row, "question"), working.strip(), result.strip())


def _mawps(row: Row) -> Example:
    answer = row.get("ans")
    result = answer.strip() if isinstance(answer, str) else repr(answer) if isinstance(answer, int | float) else ""
    return _number(row, _text(row, "original_text"), _text(row, "equation"), result.removesuffix(".0"))


def _mmlu(row: Row) -> Example:
    return _choice(
        templates.SUBJECT_CHOICE, row, _text(row, "question"), _texts(row, "options"), subject=_text(row, "subject").replace("_", " ")
    )


def _obqa(row: Row) -> Example:
    return _choice(templates.CHOICE, row, _text(row, "question"), _texts(row, "options"))


def _piqa(row: Row) -> Example:
    return _choice(templates.GOAL_CHOICE, row, _text(row, "goal"), (_text(row, "sol1"), _text(row, "sol2")))


def _siqa(row: Row) -> Example:
    options = tuple(_text(row, f"answer{letter}") for letter in "ABC")
    return _choice(templates.SITUATION_CHOICE, row, _text(row, "question"), options, context=_text(row, "context"))


def _samsum(row: Row) -> Example:
    dialogue = _text(row, "dialogue").replace("\r\n", "\n")
    return Example(templates.SUMMARY.format(dialogue=dialogue), _text(row, "summary"), dialogue)


def _wikitext(row: Row) -> Example:
    entry = _text(row, "entry")
    article = re.sub(r"^=+ .* =+\s*", "", _text(row, "content"))  # the heading repeats the title
    return Example(templates.ARTICLE.format(entry=entry), article, entry)


def _same(row: Row) -> Row:
    return row


TASKS = {
    task.name: task
    for task in (
        Task("alpaca", "rouge", 256, _instruction, Hub("tatsu-lab/alpaca", None, "train", _same)),
        Task(
            "aqua",
            "accuracy",
            256,
            _aqua,
            Hub("deepmind/aqua_rat", "raw", "test", lambda row: {**row, "answer": row["correct"]}),
        ),
        Task("boolq", "accuracy", 8, _boolq, Hub("google/boolq", None, "validation", _same)),
        Task("gsm8k", "accuracy", 256, _gsm8k, Hub("openai/gsm8k", "main", "test", _same)),
        Task(
            "mathqa",
            "accuracy",
            256,
            _mathqa,
            Hub(
                "allenai/math_qa",
                None,
                "test",
                lambda row: {
                    "question": row["Problem"],
                    "rationale": row["Rationale"],
                    "options": row["options"],
                    "answer": row["correct"],
                },
            ),
        ),
        Task("mawps", "accuracy", 64, _mawps, None),
        Task(
            "mmlu",
            "accuracy",
            32,
            _mmlu,
            Hub("cais/mmlu", "all", "test", lambda row: {**row, "options": row["choices"], "answer": row["answer"] + 1}),
        ),
        Task(
            "obqa",
            "accuracy",
            32,
            _obqa,
            Hub(
                "allenai/openbookqa",
                "main",
                "test",
                lambda row: {"question": row["question_stem"], "options": row["choices"]["text"], "answer": row["answerKey"]},
            ),
        ),
        Task("piqa", "accuracy", 64, _piqa, Hub("ybisk/piqa", None, "validation", lambda row: {**row, "answer": row["label"] + 1})),
        Task("samsum", "rouge", 96, _samsum, Hub("Samsung/samsum", None, "test", _same)),
        Task(
            "siqa", "accuracy", 32, _siqa, Hub("allenai/social_i_qa", None, "validation", lambda row: {**row, "answer": int(row["label"])})
        ),
        Task("wikitext", "rouge", 256, _wikitext, None),
        Task("common-v1", "rouge", 256, _instruction, None),
    )
}


def pick_task(name: str) -> Task:
    if name not in TASKS:
        raise CFMoEError(f"task {name} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def examples(task: Task, path: Path | None, limit: int | None = None, split: str | None = None) -> list[Example]:
    """The first `limit` examples of a task: of the file `path`, or without it of the hub's `split` (its held-out one by default)."""
    rows = hub_rows(task, split, limit) if path is None else read_rows(path, limit)
    where = f"{task.name} on the hub" if path is None else str(path)
    result = []
    for number, row in enumerate(rows, 1):
        try:
            result.append(task.example(row))
        except CFMoEError as error:
            raise CFMoEError(f"{where}: row {number} {error}; mend the row or choose the task that the file is for") from error
    if not result:
        raise CFMoEError(f"{where} has no rows; give a file with some")
    return result


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The objects of a .json list or of .jsonl lines, either also as .xz; at most `limit`."""
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind not in (".json", ".jsonl"):
        raise CFMoEError(f"{path} is neither .json, .jsonl nor .xz of one of them; rename or convert it")
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            text = decode_utf8(file.read(), path)
    except OSError as error:
        raise os_error(error, path, "read") from error
    except (lzma.LZMAError, EOFError) as error:
        raise CFMoEError(f"{path} is not a whole xz file: {error}; copy it again") from error
    try:
        rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise CFMoEError(f"{path} is not {kind[1:]}: {error}; mend the file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CFMoEError(f"{path} is not a list of objects; give one object per example")
    return rows[:limit]


def hub_rows(task: Task, split: str | None, limit: int | None = None) -> list[Row]:
    """A task's rows from the Hugging Face hub, in the fields of the local files."""
    if task.hub is None:
        raise CFMoEError(f"task {task.name} is not on the hub in a known form; give its file with --data")
    try:
        import datasets
    except ImportError as error:
        raise CFMoEError("reading the hub needs the package datasets; install it, or give a file with --data") from error
    try:
        found = datasets.load_dataset(task.hub.path, task.hub.name, split=split or task.hub.held_out)
    except Exception as error:  # of many kinds: no network, no such split, no access
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CFMoEError(f"{task.hub.path} cannot be read from the hub: {reason}; give a file with --data") from error
    chosen: Sequence[Any] = found if limit is None else found.select(range(min(limit, len(found))))
    return [task.hub.fields(dict(row)) for row in chosen]
