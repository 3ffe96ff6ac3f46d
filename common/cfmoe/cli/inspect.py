"""cfmoe inspect: what an artifact holds, how large its parts are, and whether its files are whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cfmoe.cli._common import JsonOption, facts_table, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from cfmoe.artifact import Artifact


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Artifact directory.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its SHA-256.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an artifact holds, and verify it."""
    from cfmoe.artifact import Artifact

    opened = Artifact.open(artifact)
    verified: int | None = None
    if verify:
        with progress_bar() as progress:
            verified = opened.verify(progress)
    if as_json:
        print_json(_facts(opened) | {"verified_bytes": verified})
    else:
        _print(opened, verified)


def _chat(artifact: Artifact) -> str:
    """What the apps do with messages."""
    chat, absent = artifact.manifest.chat, artifact.manifest.chat_absent
    if chat is None:
        return f"continues text: {absent}" if absent else "continues text: the checkpoint brought no chat template"
    details = [
        ("system message", chat.system is not None),
        ("thoughts are not kept", bool(chat.thinking_end)),
        ("date", bool(chat.date_format)),
    ]
    return ", ".join(["by the checkpoint's template", *(name for name, has in details if has)])


def _sizes(artifact: Artifact) -> dict[str, int]:
    """Bytes by what they are for."""
    files = artifact.manifest.files
    kernels = sum(files[target.library].size + files[target.plan].size for target in artifact.manifest.targets.values())
    sizes = {
        "experts": files["experts.bin"].size,
        "weights": files["weights.bin"].size,
        "kernels": kernels,
        "tokenizer": sum(files[name].size for name in artifact.manifest.tokenizer_files),
    }
    total = sum(entry.size for entry in files.values())
    return sizes | {"other": total - sum(sizes.values()), "total": total}


def _facts(artifact: Artifact) -> dict[str, Any]:
    from dataclasses import asdict

    manifest, experts = artifact.manifest, artifact.index.experts
    return {
        "artifact": str(artifact.path),
        "model": asdict(manifest.model),
        "quantisation": {
            "preset": manifest.quantisation_preset,
            "group_size": manifest.group_size,
            "classes": manifest.quantisation_classes,
        },
        "prefill_chunk": manifest.prefill_chunk,
        "kv_dtype": manifest.kv_dtype,
        "experts": {
            "format": experts.format,
            "count": experts.layers * experts.experts,
            "record_bytes": experts.record_bytes,
            "record_stride": experts.record_stride,
        },
        "targets": {name: asdict(target) for name, target in manifest.targets.items()},
        "chat": asdict(manifest.chat) if manifest.chat else None,
        "chat_absent": manifest.chat_absent,
        "tensors": len(artifact.index.weights),
        "bytes": _sizes(artifact),
        "provenance": manifest.provenance,
    }


def _print(artifact: Artifact, verified: int | None) -> None:
    from cfmoe.runtime import format_size

    manifest, experts, model = artifact.manifest, artifact.index.experts, artifact.manifest.model
    classes = ", ".join(f"{name} {kind}" for name, kind in manifest.quantisation_classes.items())
    stdout.print(
        facts_table(
            f"{model.name} ({artifact.path})",
            [
                ("family", model.family),
                ("parameters", f"{model.parameters:,}"),
                ("layers", f"{model.num_layers}, {len(model.moe_layers)} of them MoE"),
                ("hidden, vocabulary", f"{model.hidden_size:,}, {model.vocab_size:,}"),
                ("attention", f"{model.num_heads} heads, {model.num_kv_heads} key-value heads, {model.head_dim} wide"),
                ("experts", f"{model.num_experts} per layer, top-{model.top_k}, ffn {model.expert_ffn_size:,}"),
                ("context, prefill chunk", f"{model.context_size:,}, {manifest.prefill_chunk:,} tokens"),
                ("quantisation", f"{manifest.quantisation_preset}: {classes}; KV cache {manifest.kv_dtype}"),
                (
                    "expert record",
                    f"{experts.format}, {format_size(experts.record_bytes)}, {format_size(experts.record_stride)} with padding",
                ),
                ("chat", _chat(artifact)),
            ],
        )
    )
    stdout.print()
    rows = [(name, ", ".join((target.device, target.arch, *target.features))) for name, target in manifest.targets.items()]
    stdout.print(facts_table("Targets", rows))
    stdout.print()
    sizes = _sizes(artifact)
    stdout.print(facts_table("Sizes", [(name, f"{format_size(size):>10}  {size / sizes['total']:5.1%}") for name, size in sizes.items()]))
    stdout.print()
    stdout.print(facts_table("Provenance", list(manifest.provenance.items())))
    if verified is not None:
        stdout.print(f"\nverified: {format_size(verified)} in {len(manifest.files)} files match their SHA-256")
