"""The checkpoint's chat template, where the artifact carries one."""

from __future__ import annotations

import json

from cfmoe.artifact.reader import Artifact
from cfmoe.errors import CFMoEError, os_error

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"


def apply_chat_template(artifact: Artifact, prompt: str) -> str:
    """`prompt` as the user's first message, in the template's words and with the start of the answer.

    Raises CFMoEError where the artifact has no template, jinja2 is missing, or the template does not work.
    """
    config = _config(artifact)
    template = _template(artifact, config)
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise CFMoEError("chat templates need the package jinja2; install cfmoe[chat], or run without --chat") from error

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return environment.from_string(template).render(
            messages=[{"role": "user", "content": prompt}], add_generation_prompt=True, **special
        )
    except TemplateError as error:
        raise CFMoEError(f"{artifact.path}: the chat template does not work: {error}; run without --chat") from error


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
