"""Task sets: every sample format, prompts that do not give the answer away, and answers read without eval."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from cfmoe.errors import CFMoEError
from cfmoe.tune.answers import parse_boolean, parse_choice, parse_number, same_number
from cfmoe.tune.tasks import TASKS, Example, examples, pick_task, read_rows
from conftest import _shared

OPTIONS = ("a red ball", "a blue ball", "nothing", "12 balls", "none of these")


@pytest.mark.parametrize("name", TASKS)
def test_every_row_of_every_sample_is_read(name: str) -> None:
    path = _shared(f"data/tasks/{name}/sample.json")
    task = TASKS[name]
    found = examples(task, path)
    assert len(found) == len(json.loads(path.read_text(encoding="utf-8")))
    for example in found:
        assert example.prompt == example.prompt.strip() and example.answer == example.answer.strip()
        assert example.answer
        if task.metric == "accuracy":
            assert example.is_right(example.answer) is True, example
            assert example.is_right("I cannot tell.") is False
        else:
            assert example.is_right(example.answer) is None


@pytest.mark.parametrize("name", ["aqua", "mathqa", "mmlu", "obqa", "piqa", "siqa"])
def test_another_option_is_wrong(name: str) -> None:
    for example in examples(TASKS[name], _shared(f"data/tasks/{name}/sample.json")):
        assert isinstance(example.gold, str)
        other = next(letter for letter in "ABCDE" if letter != example.gold)
        assert example.is_right(f"The answer is {other}.") is False


def test_gsm8k_train_is_read_whole() -> None:
    found = examples(TASKS["gsm8k"], _shared("data/gsm8k_train.jsonl"))
    assert len(found) == 7473
    assert all(example.is_right(example.answer) for example in found)
    assert not any("<<" in example.answer for example in found)


def test_options_written_as_a_list_are_told_apart() -> None:
    row = {"question": "q", "rationale": "r", "answer": "c"}
    plain = TASKS["mathqa"].example({**row, "options": "a ) 4 / 3 cm , b ) rs . 1 , 500 , c ) none"})
    written = TASKS["mathqa"].example({**row, "options": "['a ) 4 / 3 cm', 'b ) rs . 1 , 500', 'c ) none']"})
    assert plain.options == written.options == ("4 / 3 cm", "rs . 1 , 500", "none")
    assert plain.gold == "C"


def test_prompt_of_a_choice_names_no_answer() -> None:
    row = {"question": "What?", "options": ["x", "y", "z", "w"], "answer": 3, "subject": "abstract_algebra"}
    example = TASKS["mmlu"].example(row)
    assert example == Example(
        "Choose the right option. Subject: abstract algebra.\nQuestion: What?\nA) x\nB) y\nC) z\nD) w\nAnswer:",
        "C) z",
        "What?",
        "C",
        ("x", "y", "z", "w"),
    )


HUB_ROWS = {
    "aqua": {"question": "q", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"},
    "mathqa": {"Problem": "q", "Rationale": "r", "options": "a ) 1 , b ) 2", "correct": "b", "category": "gain"},
    "mmlu": {"question": "q", "subject": "law", "choices": ["1", "2"], "answer": 1},
    "obqa": {"id": "1", "question_stem": "q", "choices": {"text": ["1", "2"], "label": ["A", "B"]}, "answerKey": "B"},
    "piqa": {"goal": "q", "sol1": "1", "sol2": "2", "label": 1},
    "siqa": {"context": "c", "question": "q", "answerA": "1", "answerB": "2", "answerC": "3", "label": "2"},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_rows_in_the_form_of_the_hub(name: str) -> None:
    hub = TASKS[name].hub
    assert hub is not None
    assert TASKS[name].example(hub.fields(HUB_ROWS[name])).gold == "B"


# --- answers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so she has 12 left.\n#### 12", 12),
        ("#### 1,234.50", Fraction("1234.5")),
        ("#### $70,000", 70000),
        ("#### -3", -3),
        ("first 12 - 5 = 7, then 7-3 gives 4", 4),
        ("He pays $3.50 for it.", Fraction("3.5")),
        ("The answer is 3/4 of the cake, in 2 parts", Fraction(3, 4)),
        ("The answer is 20%.", 20),
        ("Answer: 5\nQuestion: what is 9 and 9?", 5),
        ("1/0 is undefined", None),
        ("no number", None),
        ("", None),
        ("__import__('os').system('true') 7", 7),
    ],
)
def test_numbers(text: str, value: Fraction | int | None) -> None:
    assert parse_number(text) == value


def test_numbers_are_compared_within_rounding() -> None:
    assert same_number(Fraction("33.3333"), Fraction(100, 3))
    assert not same_number(Fraction("33.3"), Fraction(100, 3))
    assert not same_number(None, None)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B) a blue ball", "B"),
        ("(C)", "C"),
        ("b", "B"),
        ("The answer is D.", "D"),
        ("We see that A) is wrong, e.g. by size.\nThe answer is (b).", "B"),
        ("answer : c", "C"),
        ("A blue ball", "B"),  # the article is no letter
        ("nothing", "C"),
        ("a red ball or a blue ball", None),
        ("F)", None),  # there is no such option
        ("E, because of that", "E"),
        ("I do not know", None),
    ],
)
def test_choices(text: str, letter: str | None) -> None:
    assert parse_choice(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), (" True.", True), ("No, it is not true", False), ("false", False), ("Nobody knows", None), ("", None)],
)
def test_booleans(text: str, value: bool | None) -> None:
    assert parse_boolean(text) is value


# --- files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", "[1]", "is not a list of objects"),
        ("rows.json", "{", "is not json"),
        ("rows.jsonl", '{"question": 1}', 'row 1 has no field "answer" that is a text'),
        ("rows.jsonl", '{"question": "q", "answer": "12"}', 'row 1 has an "answer" that does not end in "#### number"'),
        ("rows.json", "[]", "has no rows"),
        ("rows.csv", "", "is neither .json, .jsonl"),
    ],
)
def test_a_bad_file_is_refused_with_the_reason(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CFMoEError, match=message) as caught:
        examples(TASKS["gsm8k"], path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_lines_of_json_keep_separators_that_python_would_split_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "one\u2028two"}\n\n{"a": "three"}\n', encoding="utf-8")
    assert read_rows(path) == [{"a": "one\u2028two"}, {"a": "three"}]
    assert read_rows(path, 1) == [{"a": "one\u2028two"}]


def test_unknown_tasks_and_tasks_that_no_hub_has_are_refused() -> None:
    with pytest.raises(CFMoEError, match="task gsm is unknown; choose one of alpaca"):
        pick_task("gsm")
    with pytest.raises(CFMoEError, match="not on the hub in a known form"):
        examples(TASKS["mawps"], None)
