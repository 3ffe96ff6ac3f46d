"""Exports, read back by the readers of those whom they are for: gguf, transformers' GGUF loader, TVM's tensor cache."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from cfmoe.artifact.chat import ChatTemplate
from cfmoe.compile import export_mlc
from cfmoe.compile.chat_probe import derive_chat
from cfmoe.compile.export_gguf import ARCHITECTURES, export_gguf
from cfmoe.compile.gguf_tokenizer import splitting_rule
from cfmoe.errors import CFMoEError
from cfmoe.runtime import Engine
from support import Cli, error_line
from tiny_families import TINY, network_logits, random_tokens, tiny_checkpoint, tiny_network

Compiled = Callable[[Path, str], Path]
EXPORTED = [case for case in sorted(TINY) if case != "deepseek_v2"]
# What the exports have no place for is left away.
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = TINY["granitemoe"][1]["rope_parameters"]
_YARN = {key: value for key, value in TINY["gpt_oss"][1]["rope_parameters"].items() if key != "truncate"}
ADAPTED: dict[str, dict[str, Any]] = {
    "deepseek_v2-lite": {"num_hidden_layers": 27},
    "gpt_oss": {"swiglu_limit": 7.0, "rope_parameters": _YARN},
    "mixtral": {"sliding_window": None},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3_moe": {"mlp_only_layers": [], "use_sliding_window": False},
}


def checkpoint(case: str, directory: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    family, fields = TINY[case]
    monkeypatch.setitem(TINY, case, (family, fields | ADAPTED.get(case, {})))
    model = tiny_checkpoint(case, directory, tokenizer)
    # The tiny models have fewer ids than the tokenizer.
    tiny = json.loads(tokenizer.read_text())
    vocab = {token: i for token, i in tiny["model"]["vocab"].items() if i < 199} | {"ÿÿ": 199}
    tiny["model"] |= {"vocab": vocab, "merges": [["ÿ", "ÿ"]]}  # llama.cpp reads no BPE without merges
    (model / "tokenizer.json").write_text(json.dumps(tiny))
    return model


def read(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def field(path: Path, name: str) -> Any:
    reader = gguf.GGUFReader(path)
    return reader.fields[name].contents()


def test_transformers_computes_the_same_from_gguf(demo_model: Path, tmp_path: Path, compiled: Compiled) -> None:
    """The weights go through the file alone; greedy tokens are those of our own f16 artifact."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    export_gguf(demo_model, tmp_path / "m.gguf", quant="f16")
    config = AutoConfig.from_pretrained(demo_model)  # GGUF's metadata is not all read by transformers
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    prompt = [(31 * i + 7) % 8000 + 10 for i in range(24)]
    with torch.no_grad():
        difference = loaded(torch.tensor([prompt])).logits - original(torch.tensor([prompt])).logits
        assert difference.abs().max() < 1e-3
        tokens = list(prompt)
        for _ in range(32):
            tokens.append(int(loaded(torch.tensor([tokens])).logits[0, -1].argmax()))
    with Engine(compiled(demo_model, "f16")) as engine, engine.session() as session:
        logits = np.array(session.feed(tokens[:-1]))
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens[len(prompt) :]


def llama(path: Path, **options: Any) -> Any:
    """llama.cpp with the model in `path`; skips where its Python package, which has to be built from source, is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return llama_cpp.Llama(str(path), n_ctx=256, n_threads=2, verbose=False, **options)


@pytest.mark.parametrize(("quant", "preset"), [("f16", "f16"), ("q8_0", "q8")])
@pytest.mark.parametrize("name", ["demo_model", pytest.param("moe_63m", marks=pytest.mark.slow)])
def test_llama_cpp_continues_a_text_in_the_same_way(
    name: str, quant: str, preset: str, tmp_path: Path, compiled: Compiled, request: pytest.FixtureRequest
) -> None:
    """Token ids and 48 greedy tokens are those of our own artifact in the nearest preset."""
    from tokenizers import Tokenizer

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = request.getfixturevalue(name)
    other = llama(export_gguf(model, tmp_path / "m.gguf", quant=quant))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with Engine(compiled(model, preset)) as engine, engine.session() as session:
        for text in ("The proposal adds a new statement to the language. It", "This module provides functions that"):
            prompt = tokenizer.encode(text).ids
            assert other.tokenize(text.encode(), add_bos=False) == prompt
            tokens = [*prompt, *(int(token) for token, _ in zip(other.generate(prompt, top_k=1), range(48), strict=False))]
            session.reset()
            logits = np.array(session.feed(tokens[:-1]))
            assert logits[len(prompt) - 1 :].argmax(-1).tolist() == tokens[len(prompt) :]
            assert len(tokens) == len(prompt) + 48
    other.close()


@pytest.mark.parametrize("case", EXPORTED)
def test_llama_cpp_computes_the_logits_of_transformers(
    case: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = export_gguf(checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json", monkeypatch), tmp_path / "m.gguf", quant="f32")
    tokens = random_tokens(120)
    other = llama(path, logits_all=True, type_k=gguf.GGMLQuantizationType.F32, type_v=gguf.GGMLQuantizationType.F32)
    other.eval(tokens)
    np.testing.assert_allclose(other.scores[: len(tokens)], network_logits(tiny_network(case), tokens), atol=1e-4)
    other.close()


def rotate(head: np.ndarray, neighbours: bool) -> np.ndarray:
    """A rotation by an angle per pair, for rows whose pairs are neighbours or half a head apart."""
    pairs = head.reshape(-1, 2).T if neighbours else head.reshape(2, -1)
    angle = np.arange(1, pairs.shape[1] + 1) / 3
    return np.stack([pairs[0] * np.cos(angle) - pairs[1] * np.sin(angle), pairs[1] * np.cos(angle) + pairs[0] * np.sin(angle)])


@pytest.mark.parametrize("case", EXPORTED)
def test_gguf_of_every_family(case: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json", monkeypatch)
    path = export_gguf(model, tmp_path / "m.gguf", quant="f32")
    source, found = load_file(model / "model.safetensors"), read(path)
    family = TINY[case][0]
    arch = ARCHITECTURES[family]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    official = {gguf.TENSOR_NAMES[t].format(bid=layer) for t in gguf.MODEL_TENSORS[number] for layer in range(layers)}
    factors = found.pop("rope_freqs.weight", None)
    assert (factors is not None) == (case == "granitemoe")
    assert {name.rpartition(".")[0] for name in found} <= official
    assert field(path, "general.architecture") == arch
    assert field(path, f"{arch}.block_count") == layers
    assert field(path, f"{arch}.expert_used_count") == 3
    # Everything is there, once.
    assert sum(v.size for v in found.values()) == sum(v.size for v in source.values())
    np.testing.assert_array_equal(found["token_embd.weight"], source["model.embed_tokens.weight"])
    attention = "model.layers.1.self_attn."
    np.testing.assert_array_equal(found["blk.1.attn_output.weight"], source[f"{attention}o_proj.weight"])
    if family != "deepseek_v2":
        neighbours = family in ("mixtral", "granitemoe", "deepseek")
        for name in "qk":
            ours, theirs = found[f"blk.1.attn_{name}.weight"], source[f"{attention}{name}_proj.weight"]
            x = np.random.default_rng(0).normal(size=theirs.shape[1])
            for head in range(len(theirs) // 32):
                rows = slice(32 * head, 32 * head + 32)
                np.testing.assert_allclose(rotate(ours[rows] @ x, neighbours), rotate(theirs[rows] @ x, False), atol=1e-6)
    gate, down = found["blk.1.ffn_gate_exps.weight"][5], found["blk.1.ffn_down_exps.weight"][5]
    expert = {
        "mixtral": ("block_sparse_moe.experts.5.w1.weight", "block_sparse_moe.experts.5.w2.weight"),
        "granitemoe": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        "gpt_oss": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    }.get(family, ("mlp.experts.5.gate_proj.weight", "mlp.experts.5.down_proj.weight"))
    expected_gate, expected_down = (source[f"model.layers.1.{name}"] for name in expert)
    if family == "granitemoe":
        expected_gate, expected_down = expected_gate[5, :96], expected_down[5]
    elif family == "gpt_oss":
        expected_gate, expected_down = expected_gate[5, :, 0::2].T, expected_down[5].T
    np.testing.assert_array_equal(gate, expected_gate)
    np.testing.assert_array_equal(down, expected_down)


def test_latent_attention_is_split_as_llama_cpp_wants_it(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint("deepseek_v2-lite", tmp_path / "model", demo_model / "tokenizer.json", monkeypatch)
    path = export_gguf(model, tmp_path / "m.gguf", quant="f32")
    found = read(path)
    kv = load_file(model / "model.safetensors")["model.layers.0.self_attn.kv_b_proj.weight"].reshape(2, 64 + 32, 64)
    np.testing.assert_array_equal(found["blk.0.attn_k_b.weight"], kv[:, :64].transpose(0, 2, 1))
    np.testing.assert_array_equal(found["blk.0.attn_v_b.weight"], kv[:, 64:])
    for name, value in {"key_length": 96, "value_length": 64, "key_length_mla": 96, "value_length_mla": 32, "head_count_kv": 1}.items():
        assert field(path, f"deepseek2.attention.{name}") == value


@pytest.mark.parametrize(("quant", "kind", "table"), [("q8_0", "Q8_0", "Q8_0"), ("q4_0", "Q4_0", "Q8_0")])
def test_quantised_gguf(quant: str, kind: str, table: str, tmp_path: Path, demo_model: Path) -> None:
    path = export_gguf(demo_model, tmp_path / "m.gguf", quant=quant)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert (types["token_embd.weight"], types["blk.3.ffn_up_exps.weight"], types["blk.3.attn_q.weight"]) == (table, kind, kind)
    assert (types["blk.3.ffn_gate_inp.weight"], types["output_norm.weight"]) == ("F32", "F32")
    up = load_file(demo_model / "model.safetensors")["model.layers.3.mlp.experts.9.up_proj.weight"].astype(np.float32)
    error = np.abs(read(path)["blk.3.ffn_up_exps.weight"][9] - up).max()
    assert error < np.abs(up).max() / (100 if quant == "q8_0" else 6)


def test_the_tokenizer_in_gguf(demo_model: Path, tmp_path: Path) -> None:
    path = export_gguf(demo_model, tmp_path / "m.gguf")
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    tokens = field(path, "tokenizer.ggml.tokens")
    assert [tokens[i] for i in tokenizer["model"]["vocab"].values()] == list(tokenizer["model"]["vocab"])
    assert field(path, "tokenizer.ggml.merges") == [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    assert field(path, "tokenizer.ggml.token_type")[0] == gguf.TokenType.CONTROL
    assert field(path, "tokenizer.ggml.pre") == "smollm"  # single digits, then GPT-2's rule
    assert splitting_rule({"pre_tokenizer": {"type": "ByteLevel"}}, "olmoe") == "gpt-2"
    assert splitting_rule({"pre_tokenizer": {"type": "Split"}}, "qwen2_moe") == "qwen2"


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("deepseek_v2", {}, "llama.cpp's deepseek2 ranks groups of experts by the sum of their two highest scores"),
        ("deepseek_v2-lite", {}, "q_lora_rank is null, which llama.cpp's deepseek2 takes with 26 or 27 layers; this model has 2"),
        ("gpt_oss", {}, "swiglu_limit: llama.cpp's gpt-oss has 7"),
        ("mixtral", {}, "sliding_window is 50: llama.cpp's llama has none"),
        ("olmoe", {}, "num_key_value_heads is 2: llama.cpp's olmoe has norms for as many"),
        ("olmoe", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}, "llama.cpp's olmoe reads no frequency factors"),
        ("qwen2_moe", {}, "sliding_window is 50: llama.cpp's qwen2moe has none"),
        ("qwen3_moe", {}, "llama.cpp's qwen3moe has them only where DeepSeek has, at the start"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(
    case: str, fields: dict[str, Any], message: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, case, (TINY[case][0], TINY[case][1] | fields))
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    with pytest.raises(CFMoEError, match=message):
        export_gguf(model, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failures_leave_nothing(tmp_path: Path, demo_model: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(CFMoEError, match="exists; give --force to replace it"):
        export_gguf(demo_model, tmp_path / "m.gguf")

    def interrupt(_what: str, done: int, _total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(demo_model, tmp_path / "m.gguf", force=True, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_mlc.export_mlc(demo_model, tmp_path / "mlc", progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_text() == "mine"


def dequantised(found: dict[str, Any], name: str, inputs: int) -> np.ndarray:
    words, scales = found[f"{name}.q_weight"].numpy(), found[f"{name}.q_scale"].numpy().astype(np.float32)
    j = np.arange(inputs)
    return (((words[..., j // 8] >> (4 * (j % 8)).astype(np.uint32)) & 15).astype(np.float32) - 7) * scales[..., j // 32]


@pytest.mark.parametrize("case", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek"])
def test_mlc_is_read_by_tvm(case: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm
    from tvm.contrib import tvmjs

    monkeypatch.setattr(export_mlc, "_SHARD_BYTES", 20_000)
    monkeypatch.setitem(ADAPTED, "qwen3_moe", ADAPTED["qwen3_moe"] | {"rope_parameters": _PLAIN_ROPE})
    model = checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json", monkeypatch)
    out = export_mlc.export_mlc(model, tmp_path / "mlc")
    found, metadata = tvmjs.load_tensor_cache(str(out), tvm.cpu())
    source = load_file(model / "model.safetensors")
    prefix = "model.layers.1."
    mixtral = case == "mixtral"
    qkv = {"deepseek": "wqkv_pack", "mixtral": "qkv_proj"}.get(case, "c_attn")
    fused = np.concatenate([source[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
    base = f"{prefix}block_sparse_moe.experts.5." if mixtral else f"{prefix}mlp.experts.5."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    experts = f"{prefix}moe." if mixtral else f"{prefix}mlp."
    names = ("e1_e3", "e2") if mixtral else ("moe_gate_up_proj", "moe_down_proj")
    pairs = [
        (dequantised(found, f"{prefix}self_attn.{qkv}", fused.shape[1]), fused),
        (dequantised(found, "model.embed_tokens", 64), source["model.embed_tokens.weight"]),
        (
            dequantised(found, experts + names[0], 64)[5],
            np.concatenate([source[f"{base}{gate}.weight"], source[f"{base}{up}.weight"]]),
        ),
        (dequantised(found, experts + names[1], source[f"{base}{down}.weight"].shape[1])[5], source[f"{base}{down}.weight"]),
    ]
    for values, expected in pairs:
        assert np.abs(values - expected).max() <= np.abs(expected).max() / 13
    router = source[f"{prefix}{'block_sparse_moe' if mixtral else 'mlp'}.gate.weight"]
    np.testing.assert_array_equal(found[f"{experts}gate.weight"].numpy(), router.astype(np.float16))
    table = json.loads((out / "tensor-cache.json").read_text())
    assert metadata["ParamSize"] == len(found)
    assert 4.0 < metadata["BitsPerParam"] < 6.0
    for record in table["records"]:
        assert record["md5sum"] == hashlib.md5((out / record["dataPath"]).read_bytes()).hexdigest()
        assert len(record["records"]) == 1 or record["nbytes"] <= 20_000
    assert len(table["records"]) > 3
    chat = json.loads((out / "mlc-chat-config.json").read_text())
    assert list(chat)[:4] == ["version", "model_type", "quantization", "model_config"]
    assert (chat["model_type"], chat["quantization"]) == (TINY[case][0], "q4f16_1")
    with pytest.raises(CFMoEError, match="exists; give --force"):
        export_mlc.export_mlc(model, out)
    export_mlc.export_mlc(model, out, force=True)


@pytest.mark.parametrize("case", ["deepseek_v2", "deepseek_v2-lite"])
def test_mlc_of_latent_attention(case: str, tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tvm
    from tvm.contrib import tvmjs

    monkeypatch.setitem(ADAPTED, case, {"rope_parameters": _PLAIN_ROPE})
    model = checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json", monkeypatch)
    out = export_mlc.export_mlc(model, tmp_path / "mlc")
    found, _ = tvmjs.load_tensor_cache(str(out), tvm.cpu())
    source = load_file(model / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    names = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *(["q_proj"] if case == "deepseek_v2-lite" else ["q_a_proj", "q_b_proj"])]
    for name in names:
        expected = source[f"{prefix}{name}.weight"]
        difference = dequantised(found, f"{prefix}{name}", expected.shape[1]) - expected
        assert np.abs(difference).max() <= np.abs(expected).max() / 13
    # What the two parts of the up-projection give for one latent is what it gives itself.
    latent = np.random.default_rng(0).normal(size=64)
    whole = (source[f"{prefix}kv_b_proj.weight"] @ latent).reshape(2, 64 + 32)
    keys, values = (found[f"{prefix}{name}"].numpy().astype(np.float64) for name in ("w_uk", "w_uv"))
    np.testing.assert_allclose(latent @ keys, whole[:, :64], atol=1e-2)
    np.testing.assert_allclose(values @ latent, whole[:, 64:], atol=1e-2)
    assert {name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)} == {
        *names,
        "w_uk",
        "w_uv",
        "kv_a_layernorm",
        *(["q_a_layernorm"] if case == "deepseek_v2" else []),
    }
    fields = json.loads((out / "mlc-chat-config.json").read_text())["model_config"]
    assert fields["rope_scaling"] == {"factor": 1.0}
    assert (fields["n_routed_experts"], fields["kv_lora_rank"], fields["topk_method"]) == (8, 64, TINY[case][1]["topk_method"])


def test_mlc_quantisation_of_a_short_group() -> None:
    words, scales = export_mlc.quantise(np.array([[-7.0, 7.0, 3.4] + [0.0] * 37]))
    assert words.shape == (1, 8)
    assert scales.tolist() == [[1.0, 0.0]]
    assert int(words[0, 0]) & 0xFFFF == 0x7AE0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gpt_oss", "gpt_oss: MLC-LLM has no model of this family; the export takes deepseek, deepseek_v2, mixtral, qwen2"),
        ("granitemoe", "granitemoe: MLC-LLM has no model of this family"),
        ("olmoe", "olmoe: MLC-LLM has no model of this family"),
        ("mixtral", "sliding_window is 50: the export to MLC-LLM has none"),
        ("qwen3_moe", "rope_scaling of type 'linear': the export of qwen3_moe to MLC-LLM takes 'default' and 'llama3'"),
        ("deepseek_v2", "rope_scaling of type 'yarn': the export of deepseek_v2 to MLC-LLM takes 'default'"),
    ],
)
def test_what_mlc_lacks_is_refused(case: str, message: str, tmp_path: Path, demo_model: Path) -> None:
    model = tiny_checkpoint(case, tmp_path / "model", demo_model / "tokenizer.json")
    with pytest.raises(CFMoEError, match=message):
        export_mlc.export_mlc(model, tmp_path / "out")


def test_a_chat_template_becomes_a_conversation() -> None:
    tokens = {"<|im_end|>": 5}

    def form(template: str) -> dict[str, Any]:
        return export_mlc.conversation(derive_chat(ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}), tokens, [2]))

    chatml = (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    found = form(chatml)
    assert (found["system_template"], found["system_message"]) == ("<s>{system_message}", "")
    assert found["roles"]["user"] == "<|im_start|>user\n"
    assert found["roles"]["assistant"] == "<|im_end|>\n<|im_start|>assistant\n"
    assert found["seps"] == ["", "<|im_end|>\n"]
    assert found["stop_token_ids"] == [2, 5]
    # A system message that the template brings itself.
    own = form("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + chatml[15:])
    first = own["system_template"].format(system_message=own["system_message"]) + own["roles"]["user"]
    assert first == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert own["system_message"] == "Be kind."
    # What stands between a role and its words, but not before a new answer.
    space = form(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    assert (space["roles"]["user"], space["roles"]["assistant"], space["role_content_sep"]) == ("[INST]", " [/INST]", " ")
    assert (space["system_template"], space["seps"]) == ("<s>{system_message}", ["", "</s>"])
    bare = export_mlc.conversation(None, [7])
    assert (bare["roles"]["user"], bare["stop_token_ids"]) == ("", [7])


def test_commands(cli: Cli, tmp_path: Path, demo_model: Path) -> None:
    result = cli("export", "gguf", demo_model, "--out", tmp_path / "m.gguf", "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["bytes"] == (tmp_path / "m.gguf").stat().st_size
    shutil.copytree(demo_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model_type 'llama' is not supported" in error_line(cli("export", "mlc", tmp_path / "model", "--out", tmp_path / "x"))
