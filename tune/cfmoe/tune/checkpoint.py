"""Opens a Hugging Face checkpoint directory for transformers: only safetensors, only transformers' own code, nothing from the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch

from cfmoe.errors import CFMoEError, os_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto: the first CUDA device, else the CPU. Raises CFMoEError where this machine has none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # by kind of device and by how torch was built
        raise CFMoEError(f"device {name} cannot be used: {_reason(error)}; choose auto, cpu or a cuda device that is there") from error
    return device


def load_model(directory: Path, device: torch.device, dtype: str = "auto") -> Any:
    """The causal language model in `directory`, in evaluation mode. `dtype` auto: float32 on the CPU, elsewhere as stored.

    Raises CFMoEError where the directory is no such checkpoint, is damaged or incomplete, or needs code that transformers does not have.
    """
    import transformers

    _check_directory(directory)
    if dtype == "auto":
        kind: Any = torch.float32 if device.type == "cpu" else "auto"
    else:
        kind = DTYPES[dtype]
    transformers.logging.set_verbosity_error()  # what it warns of is checked below
    transformers.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=kind, use_safetensors=True, trust_remote_code=False, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of many kinds: OSError, ValueError, KeyError, SafetensorError, …
        raise CFMoEError(f"{directory} cannot be opened: {_reason(error)}; code and pickles of a checkpoint are never run") from error
    if missing := sorted(info["missing_keys"]):
        raise CFMoEError(f"{directory}: {len(missing)} tensors are missing, {missing[0]} for one; fetch the checkpoint again")
    return model.eval().to(device)


def load_tokenizer(directory: Path) -> tokenizers.Tokenizer:
    """tokenizer.json of `directory`, used as the engine uses it: exactly as it says, without truncation or padding."""
    _check_directory(directory)
    path = directory / "tokenizer.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise os_error(error, path, "read") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises nothing narrower
        raise CFMoEError(f"{path} cannot be used: {_reason(error)}; fetch the checkpoint again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise CFMoEError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint")


def _reason(error: BaseException) -> str:
    """The beginning of what `error` says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:200] + "…").rstrip(".")
