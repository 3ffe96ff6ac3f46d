"""Chat templates: the words that transformers makes of them, and templates that fail or reach for what is not theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import artifacts
from cfmoe.artifact import Artifact
from cfmoe.artifact.chat import ChatTemplate, apply_chat_template
from cfmoe.artifact.writer import ArtifactWriter
from cfmoe.compile.mlc_config import tokenizer_info
from cfmoe.errors import CFMoEError

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "turns": (
        "{{ bos_token }}{%- for m in messages -%}\n"
        "    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}\n"
        "    {% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}\n"
        "{%- endfor %}"
    ),
    "blocks": (
        "{%- set ns = namespace(first=true) -%}\n{% for m in messages %}\n  {% if not ns.first %}\n---\n  {% endif %}\n"
        "{% set ns.first = false %}\n{% if m.content is defined %}\n<{{ m.role }}>{{ m.content }}\n{% endif %}\n"
        "{% if loop.last %}{% break %}{% endif %}\n{% endfor %}\n{% if add_generation_prompt %}<assistant>{% endif %}"
    ),
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{{ eos_token }}{% endgeneration %}{% endfor %}",
    "macro": "{% macro say(m) %}{{ m.role | upper }}: {{ m.content }}{% endmacro %}{% for m in messages %}{{ say(m) }}\n{% endfor %}",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = [
    [{"role": "user", "content": 'Ünï <b>code</b> & "quotes"  '}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c\n"}],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_give_what_transformers_gives(name: str, demo_model: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(demo_model / "tokenizer.json"), **SPECIAL)
    for messages in CHATS:
        expected = tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False)
        assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('system messages are not for this model') }}", "system messages are not for this model"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
        ("{{ strftime_now(messages) }}", "str"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(CFMoEError, match="the chat template does not work: ") as failed:
        ChatTemplate(template, {}).render(CHATS[0])
    assert reason in str(failed.value)
    assert "\n" not in str(failed.value)


def artifact_with(path: Path, files: dict[str, Any]) -> Artifact:
    with ArtifactWriter(path) as writer:
        artifacts.fill(writer)
        for name, value in files.items():
            writer.add_file(name, (value if isinstance(value, str) else json.dumps(value)).encode())
        writer.finish(artifacts.manifest() | {"tokenizer_files": ["tokenizer.json", *files]})
    return Artifact.open(path)


def test_where_the_template_and_its_tokens_come_from(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    for number, config in enumerate((template, named)):
        opened = artifact_with(tmp_path / str(number), {"tokenizer_config.json": tokens | {"chat_template": config}})
        assert apply_chat_template(opened, "hi") == "<s>hi</s>"
    files = {"tokenizer_config.json": tokens | {"chat_template": "old"}, "chat_template.jinja": template}
    assert apply_chat_template(artifact_with(tmp_path / "file", files), "hi") == "<s>hi</s>"


def test_artifacts_without_a_template_that_works(tmp_path: Path) -> None:
    with pytest.raises(CFMoEError, match="has no chat template, the checkpoint brought none; run without --chat"):
        apply_chat_template(artifact_with(tmp_path / "none", {"tokenizer_config.json": {}}), "hi")
    broken = artifact_with(tmp_path / "broken", {"chat_template.jinja": "{{"})
    with pytest.raises(CFMoEError, match=r"broken: the chat template does not work: .*; run without --chat"):
        apply_chat_template(broken, "hi")


def test_tokenizer_facts() -> None:
    llama = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace"}]},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
    }
    assert tokenizer_info(llama) == {
        "token_postproc_method": "byte_fallback",
        "prepend_space_in_encode": True,
        "strip_space_in_decode": True,
    }
    assert tokenizer_info({"decoder": {"type": "ByteLevel"}, "normalizer": None}) == {
        "token_postproc_method": "byte_level",
        "prepend_space_in_encode": False,
        "strip_space_in_decode": False,
    }
