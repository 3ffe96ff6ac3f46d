"""The checkpoint's chat template: where it stands, and its words for a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

from cfmoe.artifact.reader import Artifact
from cfmoe.errors import CFMoEError, os_error

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = dict[str, str]  # role, content


def apply_chat_template(artifact: Artifact, prompt: str) -> str:
    """`prompt` as the user's first message, in the template's words and with the start of the answer.

    By the manifest's `chat` where it has one, which are the same words; else by the template itself. Raises CFMoEError where the artifact
    has no template, jinja2 is missing, or the template does not work.
    """
    if (chat := artifact.manifest.chat) is not None:
        return chat.render([prompt], today=date.today())
    template = read_template(artifact.path, [name for name in (_CONFIG, _TEMPLATE) if name in artifact.manifest.files])
    if template is None:
        raise CFMoEError(f"{artifact.path} has no chat template, the checkpoint brought none; run without --chat")
    try:
        return template.render([{"role": "user", "content": prompt}])
    except CFMoEError as error:
        raise CFMoEError(f"{artifact.path}: {error}; run without --chat") from error


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's template and its special tokens by name.

    It runs in jinja2's sandbox: it sees the messages, the special tokens and what `_environment` adds, and reaches neither files nor
    Python.
    """

    source: str
    special_tokens: dict[str, str]

    def render(self, messages: Sequence[Message]) -> str:
        """`messages` as transformers renders them, ready for the answer. Raises CFMoEError as `renderer` does."""
        return self.renderer(lambda form: datetime.now().strftime(form))(messages)

    def renderer(self, now: Callable[[str], str]) -> Callable[[Sequence[Message]], str]:
        """Renders many chats; `now` formats today's date.

        Both raise CFMoEError: where jinja2 is missing or the template does not work, whatever the reason.
        """
        environment, failures = _environment(now)

        def guarded(work: Callable[[], Any]) -> Any:
            try:
                return work()
            except failures as error:
                raise CFMoEError(f"the chat template does not work: {' '.join(str(error).split())}") from error

        compiled = guarded(lambda: environment.from_string(self.source))
        return lambda messages: guarded(
            lambda: compiled.render(messages=messages, add_generation_prompt=True, **self.special_tokens),
        )


def read_template(directory: Path, names: Sequence[str] = (_CONFIG, _TEMPLATE)) -> ChatTemplate | None:
    """The template among the files `names` of an artifact or checkpoint; None where there is none. Raises CFMoEError."""
    config = _config(directory) if _CONFIG in names else {}
    template = (_read(directory / _TEMPLATE) if _TEMPLATE in names else None) or config.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": "default", "template": …}, …]
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        return None
    return ChatTemplate(template, {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name)))})


def _environment(now: Callable[[str], str]) -> tuple[Any, tuple[type[Exception], ...]]:
    """The sandbox with what templates expect beyond plain jinja2, and the exceptions by which a template can fail."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise CFMoEError("chat templates need the package jinja2; install cfmoe[chat]") from error

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks the model's words for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=now)
    return environment, (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _config(directory: Path) -> dict[str, object]:
    text = _read(directory / _CONFIG)
    try:
        config = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise CFMoEError(f"{directory / _CONFIG} is not JSON: {error}; save the tokenizer again") from error
    return config if isinstance(config, dict) else {}


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise os_error(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise CFMoEError(f"{path} is not UTF-8 at offset {error.start}; save the tokenizer again") from error


def _token_text(token: object) -> str:
    """A special token is a text, or an object with the text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
