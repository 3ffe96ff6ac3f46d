"""The checkpoint's chat template, where the artifact carries one."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from cfmoe.artifact.reader import Artifact
from cfmoe.errors import CFMoEError, os_error

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def apply_chat_template(artifact: Artifact, prompt: str) -> str:
    """`prompt` as the user's first message, in the template's words and with the start of the answer.

    Raises CFMoEError where the artifact has no template, jinja2 is missing, or the template does not work.
    """
    config = _config(artifact)
    template = _template(artifact, config)
    special = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name)))}
    try:
        return render(template, [{"role": "user", "content": prompt}], special)
    except CFMoEError as error:
        raise CFMoEError(f"{artifact.path}: {error}; run without --chat") from error


def render(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """`messages` (role, content) through a chat template as transformers understands them, ready for the answer.

    The template runs in jinja2's sandbox: it sees the messages, the special tokens by name and what `_environment` adds, and reaches
    neither files nor Python. Raises CFMoEError where jinja2 is missing or the template does not work, whatever the reason.
    """
    environment, failures = _environment()
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special_tokens)
    except failures as error:
        raise CFMoEError(f"the chat template does not work: {' '.join(str(error).split())}") from error


def _environment() -> tuple[Any, tuple[type[Exception], ...]]:
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

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json  # jinja2's own escapes for HTML
    environment.globals.update(raise_exception=raise_exception, strftime_now=now)
    return environment, (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def _config(artifact: Artifact) -> dict[str, object]:
    text = _read(artifact, _CONFIG)
    try:
        config = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise CFMoEError(f"{artifact.path / _CONFIG} is not JSON: {error}; compile the model again") from error
    return config if isinstance(config, dict) else {}


def _template(artifact: Artifact, config: dict[str, object]) -> str:
    template = _read(artifact, _TEMPLATE) or config.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": "default", "template": …}, …]
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    if not isinstance(template, str) or not template:
        raise CFMoEError(f"{artifact.path} has no chat template, the checkpoint brought none; run without --chat")
    return template


def _read(artifact: Artifact, name: str) -> str | None:
    if name not in artifact.manifest.files:
        return None
    path = artifact.path / name
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise os_error(error, path, "read") from error
    except UnicodeDecodeError as error:
        raise CFMoEError(f"{path} is not UTF-8 at offset {error.start}; compile the model again") from error


def _token_text(token: object) -> str:
    """A special token is a text, or an object with the text in `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
