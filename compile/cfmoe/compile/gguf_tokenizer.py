"""tokenizer.json in GGUF's terms: tokens and their kinds, merges or scores, and the name that llama.cpp has for the way text is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfmoe.compile.checkpoint import read_json
from cfmoe.compile.decoder_config import DecoderConfig
from cfmoe.errors import CFMoEError

# llama.cpp knows splitting rules by name; a checkpoint of these families has the family's own.
_RULES = {
    "deepseek": "deepseek-llm",
    "deepseek_v2": "deepseek-llm",
    "gpt_oss": "gpt-4o",
    "granitemoe": "refact",
    "olmoe": "olmo",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen2",
}


def _steps(tokenizer: dict[str, Any], place: str, plural: str) -> list[dict[str, Any]]:
    step = tokenizer.get(place) or {}
    members = step.get(plural, []) if step.get("type") == "Sequence" else [step]
    return [member for member in members if isinstance(member, dict)]


def splitting_rule(tokenizer: dict[str, Any], family: str) -> str:
    """llama.cpp's name for the pre-tokenizer: by its steps where they are plain, else the family's."""
    steps = _steps(tokenizer, "pre_tokenizer", "pretokenizers")
    kinds = [step.get("type") for step in steps]
    plain = bool(steps) and steps[-1].get("type") == "ByteLevel" and steps[-1].get("use_regex", True)
    if plain and kinds == ["ByteLevel"]:
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return _RULES.get(family, "default")


def add_tokenizer(writer: Any, model: Path, config: DecoderConfig, tokenizer: dict[str, Any]) -> None:
    """Adds the tokenizer to GGUF `writer`. Raises CFMoEError where it is no BPE tokenizer that llama.cpp could have."""
    from gguf import TokenType

    bpe = tokenizer.get("model")
    if not isinstance(bpe, dict) or bpe.get("type") != "BPE" or not isinstance(bpe.get("vocab"), dict):
        kind = bpe.get("type") if isinstance(bpe, dict) else None
        raise CFMoEError(f"{model / 'tokenizer.json'}: is a {kind} tokenizer; the export to llama.cpp takes BPE only")
    pieces = bpe.get("byte_fallback", False)  # SentencePiece's kind
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [TokenType.UNUSED] * config.vocab_size
    entries = [(text, number, TokenType.NORMAL) for text, number in bpe["vocab"].items()]
    for added in tokenizer.get("added_tokens", []):
        entries.append((added["content"], added["id"], TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED))
    for text, number, kind in entries:
        if not isinstance(number, int) or not 0 <= number < config.vocab_size:
            raise CFMoEError(f"{model / 'tokenizer.json'}: token {text!r} has id {number}, but vocab_size is {config.vocab_size}")
        tokens[number], kinds[number] = text, kind
        if pieces and kind == TokenType.NORMAL and len(text) == 6 and text.startswith("<0x"):
            kinds[number] = TokenType.BYTE
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else splitting_rule(tokenizer, config.family))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces:
        # Of two merges the one with the earlier result comes first; in SentencePiece's order of ids that is the higher score.
        writer.add_token_scores([-float(i) for i in range(config.vocab_size)])
    else:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe.get("merges", [])])
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_add_bos_token(_prepends_bos(tokenizer))
    template = _chat_template(model)
    if template:
        writer.add_chat_template(template)


def _prepends_bos(tokenizer: dict[str, Any]) -> bool:
    for step in _steps(tokenizer, "post_processor", "processors"):
        single = step.get("single", [])
        if step.get("type") == "TemplateProcessing" and single and "SpecialToken" in single[0]:
            return True
    return False


def _chat_template(model: Path) -> str | None:
    path = model / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8")
    config = read_json(model / "tokenizer_config.json") if (model / "tokenizer_config.json").exists() else {}
    template = config.get("chat_template")
    return template if isinstance(template, str) else None
