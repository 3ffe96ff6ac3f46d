"""The plain conversation of chat templates: found, held against the template's own words, written to the manifest and read again."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

import artifacts
from cfmoe.artifact import Artifact
from cfmoe.artifact.chat import ChatTemplate, apply_chat_template
from cfmoe.artifact.chat_format import DATE_MARK, ChatFormat, format_date, is_date_format
from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile.chat_probe import checkpoint_chat, derive_chat
from cfmoe.errors import CFMoEError
from support import Cli
from test_chat import SPECIAL, TEMPLATES

# In the manner of the families that are compiled, each with what is special about it.
FAMILIES = {
    "qwen2": (  # a system message of its own
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "qwen3": (  # thoughts of past answers go, tools are written out where there are any
        "{%- if tools %}{{- '<|im_start|>system\\n# Tools' }}{%- else %}\n"
        "{%- if messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}{%- endif %}\n"
        "{%- set ns = namespace(open=true, asked=messages|length - 1) %}\n"
        "{%- for m in messages[::-1] %}{%- set at = (messages|length - 1) - loop.index0 %}\n"
        "{%- if ns.open and m.role == 'user' and not(m.content.startswith('<tool_response>')) %}"
        "{%- set ns.open = false %}{%- set ns.asked = at %}{%- endif %}{%- endfor %}\n"
        "{%- for m in messages %}{%- if (m.role == 'user') or (m.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}\n"
        "{%- elif m.role == 'assistant' %}{%- set content = m.content %}{%- set thought = '' %}\n"
        "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}{%- elif '</think>' in content %}\n"
        "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}\n"
        "{%- if loop.index0 > ns.asked and (loop.last or thought) %}"
        "{{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    ),
    "thinker": (  # the answer begins inside of a thought, which the past does not have
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'system' %}{{ m.content }}\n\n"
        "{% else %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "<|Assistant|>{{ c }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    ),
    "mixtral": (  # no system message; the roles must alternate
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate: user, assistant, user') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token}}{% else %}{{ raise_exception('only user and assistant') }}"
        "{% endif %}{% endfor %}"
    ),
    "mixtral-system": (  # the system's text inside of the first message
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{% if loop.first and system is defined %}{{ ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}{% else %}"
        "{{ ' [INST] ' + m.content + ' [/INST]' }}{% endif %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "deepseek": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + m['content'] + eos_token }}{% elif m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "granite": (  # the date in a system message of its own
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}"
        '{%- else %}{%- set system = "Knowledge Cutoff Date: April 2024.\nToday\'s Date: "'
        " + strftime_now('%B %d, %Y') + \".\nYou are a model.\" %}"
        "{%- set rest = messages %}{%- endif %}{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}"
        "{%- for m in rest %}{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
        "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
    ),
    "llama3": (  # everything trimmed
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set s = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}"
        "{%- else %}{%- set s = '' %}{%- endif %}<|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
}
HARMONY = (  # the model names the channel of its answer itself
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TOKENS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|User|>", "<|Assistant|>", "<|end|>", "<|end_of_text|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|channel|>", "<|message|>"),
]
ADDED = {text: number for number, text in enumerate(TOKENS)}
SAID = ["Say é.", " \n[INST] <|im_end|> ", "<think>\nno\n</think>\n\nThe answer\n", "x", "  \u2009y\tz\n", "last {{ one }}\n\n"]


def derive(name: str) -> ChatFormat:
    return derive_chat(ChatTemplate((FAMILIES | TEMPLATES)[name], SPECIAL), ADDED, [ADDED["</s>"]])


def chats() -> list[tuple[list[str], str | None]]:
    """All orders of what is said, in chats of one, three and five messages."""
    orders = [list(order) for count in (1, 3, 5) for order in itertools.permutations(SAID, count)]
    return [(order, system) for order in orders[::7] for system in (None, "Be brief.", " two\nlines ", "")]


@pytest.mark.parametrize("name", [*FAMILIES, "chatml", "turns", "blocks", "generation"])
def test_the_conversation_has_the_words_of_transformers(name: str, demo_model: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(demo_model / "tokenizer.json"), **SPECIAL)
    found, template = derive(name), (FAMILIES | TEMPLATES)[name]
    today = datetime.now().date()
    for said, system in chats():
        if system is not None and found.system is None:
            continue
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]
        messages = [{"role": "system", "content": system}, *messages] if system is not None else messages
        expected = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
        assert found.render(said, system, today) == expected


def test_what_is_found() -> None:
    qwen2 = derive("qwen2")
    assert qwen2.system is not None
    assert qwen2.system.default == "You are helpful."
    assert qwen2.system.empty == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    assert qwen2.reply == qwen2.replied == "<|im_end|>\n<|im_start|>assistant\n"
    assert qwen2.stop_token_ids == (ADDED["</s>"], ADDED["<|im_end|>"])
    qwen3 = derive("qwen3")
    assert (qwen3.thinking_end, qwen3.thinking_trim) == ("</think>", "newlines")
    assert qwen3.past("<think>\na</think>\n\n b ") == " b "
    thinker = derive("thinker")
    assert (thinker.reply, thinker.replied) == ("<|Assistant|><think>\n", "<|Assistant|>")
    assert thinker.stop_token_ids == (ADDED["</s>"], ADDED["<|end|>"])
    assert derive("mixtral").system is None
    system = derive("mixtral-system").system
    assert system is not None and (system.before, system.after) == ("<s> [INST] ", "\n\n")
    assert derive("deepseek").stop_token_ids == (ADDED["</s>"],)
    granite = derive("granite")
    assert granite.system is not None
    assert granite.date_format == "%B %d, %Y"
    assert granite.system.default == f"Knowledge Cutoff Date: April 2024.\nToday's Date: {DATE_MARK}.\nYou are a model."
    assert "Date: November 05, 2026." in granite.render(["x"], today=date(2026, 11, 5))
    llama = derive("llama3")
    assert llama.system is not None
    assert (llama.trim_user, llama.trim_answer, llama.system.trim, llama.date_format) == (True, True, True, "%d %b %Y")
    # Where no token ends an answer, the text that follows it does.
    assert derive("blocks").stop_strings == ("---\n<user>",)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (HARMONY, "has to write '<|channel|>final<|message|>', which holds the special token <|channel|>"),
        (TEMPLATES["json"], "leaves out, changes or repeats messages"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "puts nothing around messages"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "not always the same: a chat of 5 messages"),
        (
            "{{ messages|length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
            "other texts around a message when more messages follow",
        ),
        ("{% for m in messages[-3:] %}<{{ m.role }}>{{ m.content }}{% endfor %}", "not always the same: a chat of 5 messages"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | upper }}{% endfor %}", "leaves out, changes or repeats"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | escape }}{% endfor %}", "changes an answer that shows its thoughts"),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content.lstrip() }}{% endfor %}", "changes what a person says in a way"),
        ("{{ strftime_now('%H:%M') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "writes a time as '%H:%M'"),
        ("{{ strftime_now('%d') }}{{ strftime_now('%Y') }}", "dates in two forms, '%d' and '%Y'"),
        ("{{ 'x' * 20000 }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "more than 16384 characters"),
        ("{% for m in messages %}\ue000{{ m.role }}{{ m.content }}{% endfor %}", "writes U+E000"),
        ("{{ raise_exception('not today') }}", "does not work: not today"),
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.content|length > 100 %}!{% endif %}{% endfor %}",
            "comes out otherwise",
        ),
    ],
)
def test_templates_that_are_more_than_texts_around_messages(template: str, reason: str) -> None:
    with pytest.raises(CFMoEError) as refused:
        derive_chat(ChatTemplate(template, SPECIAL), ADDED)
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_dates_have_english_names_everywhere() -> None:
    day = date(2026, 3, 7)
    for form in ("%Y-%m-%d", "%d %b %Y", "%A, %B %d, %Y", "day %j", ""):
        assert is_date_format(form)
        assert format_date(day, form) == day.strftime(form)
    for form in ("%H", "%", "%%", "%-d", "%Y%"):
        assert not is_date_format(form)


def written(path: Path, fields: dict[str, Any]) -> Artifact:
    with ArtifactWriter(path) as writer:
        artifacts.fill(writer)
        writer.finish(artifacts.manifest() | fields)
    return Artifact.open(path)


def test_the_manifest_keeps_it(tmp_path: Path) -> None:
    for number, name in enumerate(("qwen3", "mixtral", "granite")):
        found = derive(name)
        opened = written(tmp_path / str(number), {"chat": found.record()})
        assert opened.manifest.chat == found
        assert apply_chat_template(opened, "hi") == found.render(["hi"], today=datetime.now().date())
    assert written(tmp_path / "none", {"chat_absent": "why"}).manifest.chat_absent == "why"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"begin": None}, "chat.begin"),
        ({"begin": "x" * 20000}, "chat.begin has 20000 characters, more than 16384"),
        ({"stop_token_ids": [64]}, "is 64, not between 0 and 63"),
        ({"stop_token_ids": [1] * 65}, "holds 65 tokens"),
        ({"stop_strings": [""]}, "chat.stop_strings"),
        ({"trim_user": 1}, "chat.trim_user is 1, not true or false"),
        ({"thinking_trim": "some"}, "chat.thinking_trim is 'some', not one of none, newlines, all"),
        ({"date_format": "%H"}, "chat.date_format is '%H'"),
        ({"system": {"before": ""}}, "chat.system.after is missing"),
    ],
)
def test_a_damaged_conversation_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    found = replace(derive("qwen3"), stop_token_ids=(1,))
    with pytest.raises(CFMoEError) as refused:
        written(tmp_path / "x", {"chat": found.record() | change})
    assert reason in str(refused.value)


@pytest.mark.slow
def test_compile_writes_it_and_says_where_it_cannot(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    for name, template in (("chatty", FAMILIES["qwen2"]), ("harmony", HARMONY.replace("<|channel|>", "<|user|>"))):
        shutil.copytree(demo_model, tmp_path / name)
        config = json.loads((demo_model / "tokenizer_config.json").read_text())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert checkpoint_chat(demo_model, [0], 8192) == (None, "")
    chat, reason = checkpoint_chat(tmp_path / "chatty", [0], 8192)
    assert chat is not None and reason == ""
    # <|im_end|> is no token of this tokenizer: its text ends an answer.
    assert (chat.stop_token_ids, chat.stop_strings) == ((0,), ("<|im_end|>\n<|im_start|>user",))
    for name, said in (("harmony", True), ("chatty", False)):
        result = cli("compile", tmp_path / name, "--out", tmp_path / f"{name}.cfmoe", "--json")
        assert result.returncode == 0, result.stderr
        assert ("note: the apps will not use the chat template: before its answer" in result.stderr) == said
        facts = json.loads(cli("inspect", tmp_path / f"{name}.cfmoe", "--json").stdout)
        assert (facts["chat"] is None, bool(facts["chat_absent"])) == (said, said)
        assert json.loads(result.stdout)["chat"] != said
    assert "by the checkpoint's template, system message" in cli("inspect", tmp_path / "chatty.cfmoe").stdout
    # Words of the manifest and of the template, and an answer behind them.
    answer = cli("run", tmp_path / "chatty.cfmoe", "--chat", "--prompt", "hi", "--max-new-tokens", "4", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["new_tokens"] == 4
