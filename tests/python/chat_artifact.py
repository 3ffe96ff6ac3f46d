"""What the apps' tests need of chat templates: the demo model with one, and conversations with their words."""

from __future__ import annotations

import json
import os
import shutil
from datetime import date
from pathlib import Path

from cfmoe.artifact.layout import MANIFEST
from cfmoe.artifact.writer import seal
from cfmoe.compile.chat_probe import checkpoint_chat
from test_chat_format import FAMILIES, chats, derive

# In the tokens that the demo model has: trims, brings a system message of its own, forgets thoughts, and ends answers with <|pad|>.
TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}Be kind.{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}<|user|>{{ m.content | trim }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] if '</think>' in m.content else m.content }}<|pad|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_chat_artifact(artifact: Path, model: Path, out: Path) -> Path:
    """`artifact` as if its checkpoint `model` had brought TEMPLATE; big files are links."""
    checkpoint = out.with_name(out.name + "-checkpoint")
    checkpoint.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, checkpoint / name)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    chat, reason = checkpoint_chat(checkpoint, [0], 8192)
    assert chat is not None, reason
    shutil.copytree(artifact, out, copy_function=lambda source, to: os.link(source, to) if MANIFEST not in source else None)
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["xxh3_64"]
    manifest["model"]["name"] = "demo-chat"
    (out / MANIFEST).write_bytes(seal(manifest | {"chat": chat.record()}))
    return out


def write_conversations(out: Path) -> Path:
    """A list: a format as the manifest has it, and chats, each with system, messages, day and the text that the template makes."""
    day = date(2026, 3, 7)
    rows = []
    for name in FAMILIES:
        found = derive(name)
        said = [(messages, system) for messages, system in chats()[::5] if system is None or found.system is not None]
        texts = [{"messages": m, "system": s, "day": day.isoformat(), "text": found.render(m, s, day)} for m, s in said]
        rows.append({"chat": found.record(), "chats": texts})
    out.write_text(json.dumps(rows))
    return out
