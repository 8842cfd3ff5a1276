"""Tiny random checkpoints: Hugging Face folders and GGUF files of every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from pack import bf16, pack

SIZES = dict(vocab=320, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=2)
SIZES |= dict(expert_size=64, ffn_size=96, shared_size=96, context=256)
K_QUANT_SIZES = dict(hidden=256, head_dim=64, expert_size=256, ffn_size=256, shared_size=256)

ARCHITECTURES = "llama", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"
GGUF_NAMES = dict(olmoe="olmoe", qwen2_moe="qwen2moe", qwen3_moe="qwen3moe")  # others: llama


class Weight(NamedTuple):
    hf: str
    gguf: str  # "" for one expert's matrix; GGUF has all of a layer in one
    values: np.ndarray  # float32


def weights(model_type: str, seed: int = 0, tied: bool = False, **sizes: int) -> list[Weight]:
    """All tensors of a random model; matrices are scaled so that activations stay finite."""
    s = {**SIZES, **sizes}
    rng = np.random.default_rng(seed)
    found: list[Weight] = []

    def add(hf: str, gguf: str, *shape: int, scale: float = 1.0) -> None:
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values *= scale / np.sqrt(np.float32(shape[-1]))
        elif hf.endswith(".bias"):
            values *= np.float32(0.1)
        else:
            values = 1 + np.float32(0.1) * values
        found.append(Weight(hf + ("" if hf.endswith("bias") else ".weight"), gguf, values))

    hidden, q, kv = s["hidden"], s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    add("model.embed_tokens", "token_embd.weight", s["vocab"], hidden, scale=np.sqrt(hidden))
    add("model.norm", "output_norm.weight", hidden)
    if not tied:
        add("lm_head", "output.weight", s["vocab"], hidden)
    for i in range(s["layers"]):
        hf, gg = f"model.layers.{i}.", f"blk.{i}."
        add(hf + "input_layernorm", gg + "attn_norm.weight", hidden)
        add(hf + "post_attention_layernorm", gg + "ffn_norm.weight", hidden)
        for name, size in ("q", q), ("k", kv), ("v", kv):
            add(f"{hf}self_attn.{name}_proj", f"{gg}attn_{name}.weight", size, hidden)
            if model_type == "qwen2_moe":
                add(f"{hf}self_attn.{name}_proj.bias", f"{gg}attn_{name}.bias", size)
        add(hf + "self_attn.o_proj", gg + "attn_output.weight", hidden, q)
        if model_type in ("olmoe", "qwen3_moe"):
            full = model_type == "olmoe"
            add(hf + "self_attn.q_norm", gg + "attn_q_norm.weight", q if full else s["head_dim"])
            add(hf + "self_attn.k_norm", gg + "attn_k_norm.weight", kv if full else s["head_dim"])
        if model_type == "llama":
            _feed_forward(add, hf + "mlp.", gg + "ffn_{}.weight", hidden, s["ffn_size"])
            continue
        mlp = hf + ("block_sparse_moe." if model_type == "mixtral" else "mlp.")
        add(mlp + "gate", gg + "ffn_gate_inp.weight", s["experts"], hidden, scale=2.0)
        w = ("w1", "w3", "w2") if model_type == "mixtral" else None
        for expert in range(s["experts"]):
            _feed_forward(add, f"{mlp}experts.{expert}.", "", hidden, s["expert_size"], w)
        if model_type == "qwen2_moe":
            _feed_forward(add, mlp + "shared_expert.", gg + "ffn_{}_shexp.weight", hidden,
                          s["shared_size"])  # fmt: skip
            add(mlp + "shared_expert_gate", gg + "ffn_gate_inp_shexp.weight", 1, hidden)
    return found


def _feed_forward(add: Any, hf: str, gguf: str, hidden: int, size: int, names: Any = None) -> None:
    gate, up, down = names or ("gate_proj", "up_proj", "down_proj")
    add(hf + gate, gguf.format("gate"), size, hidden)
    add(hf + up, gguf.format("up"), size, hidden)
    add(hf + down, gguf.format("down"), hidden, size)


# --- Hugging Face ---


def hf_config(model_type: str, **sizes: Any) -> dict[str, Any]:
    s = {**SIZES, **sizes}
    config = dict(
        model_type=model_type, vocab_size=s["vocab"], hidden_size=s["hidden"],
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"], rms_norm_eps=1e-5,
        max_position_embeddings=s["context"], rope_theta=10_000.0, hidden_act="silu",
        tie_word_embeddings=False, eos_token_id=s["vocab"] - 1,
    )  # fmt: skip
    if model_type == "llama":
        return config | dict(intermediate_size=s["ffn_size"])
    config |= dict(num_experts_per_tok=s["top_k"])
    config["num_local_experts" if model_type == "mixtral" else "num_experts"] = s["experts"]
    if model_type in ("mixtral", "olmoe"):
        return config | dict(intermediate_size=s["expert_size"])
    config |= dict(moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"])
    if model_type == "qwen2_moe":
        return config | dict(shared_expert_intermediate_size=s["shared_size"])
    return config | dict(norm_topk_prob=True)


def hf_checkpoint(
    folder: Path, model_type: str = "mixtral", dtype: str = "bf16", seed: int = 0,
    num_files: int = 1, tokenizer: bool = False, config: dict[str, Any] | None = None,
    **sizes: int,
) -> Path:  # fmt: skip
    """A folder with config.json and safetensors; `config` changes or adds entries of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    values = hf_config(model_type, **sizes) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    tensors = weights(model_type, seed, values["tie_word_embeddings"], **sizes)
    names = [f"model-{n + 1:05}-of-{num_files:05}.safetensors" for n in range(num_files)]
    names = names if num_files > 1 else ["model.safetensors"]
    weight_map = {}
    for number, name in enumerate(names):
        part = {w.hf: w.values for w in tensors[number::num_files]}
        write_safetensors(folder / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    if num_files > 1:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(index)
    if tokenizer:
        write_tokenizer(folder, {**SIZES, **sizes}["vocab"])
    return folder


def write_safetensors(file: Path, tensors: dict[str, np.ndarray], dtype: str = "bf16") -> None:
    kinds = {"bf16": bf16, "f16": np.float16, "f32": np.float32}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, values in tensors.items():
        parts.append(np.asarray(kinds[dtype](values)).tobytes())
        end = offset + len(parts[-1])
        header[name] = dict(
            dtype=dtype.upper(), shape=list(values.shape), data_offsets=[offset, end]
        )
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Byte-level tokens (the last one ends a text) and merges."""
    tokens = _letters()
    merges = []
    for pair in ("t h", "h e", "i n", "a n", "e r", "Ġ t", "Ġ a", "th e"):
        merges.append(pair)
        tokens.append(pair.replace(" ", ""))
    tokens += [f"<x{n}>" for n in range(size - 1 - len(tokens))]
    return [*tokens[: size - 1], "<|end|>"], merges


def _letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_tokenizer(folder: Path, size: int) -> None:
    tokens, merges = vocabulary(size)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            dict(id=size - 1, content="<|end|>", single_word=False, lstrip=False, rstrip=False,
                 normalized=False, special=True)
        ],
        "pre_tokenizer": dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True,
                              use_regex=True),
        "decoder": dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True,
                        use_regex=True),
        "model": dict(type="BPE", vocab={token: n for n, token in enumerate(tokens)},
                      merges=merges),
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


# --- GGUF ---


def gguf_checkpoint(
    file: Path, model_type: str = "mixtral", format: str = "q4_0", seed: int = 0,
    formats: dict[str, str] | None = None, parts: int = 1, tied: bool = False,
    metadata: dict[str, Any] | None = None, rope_factors: list[float] | None = None,
    **sizes: int,
) -> Path:  # fmt: skip
    """A GGUF file. `formats` says for parts of tensor names what differs from `format`.

    With several `parts` it is split, and the path of the first part is returned.
    """
    if any("_k" in f for f in [format, *(formats or {}).values()]):
        sizes = {**K_QUANT_SIZES, **sizes}
    tensors = [w for w in weights(model_type, seed, tied, **sizes) if w.gguf]
    tensors += list(_fused(weights(model_type, seed, tied, **sizes)))
    if rope_factors is not None:
        factors = np.array(rope_factors, np.float32)
        tensors.append(Weight("", "rope_freqs.weight", factors))
    writer = gguf.GGUFWriter(
        file, GGUF_NAMES.get(model_type, "llama"),
        split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0,
    )  # fmt: skip
    _write_metadata(writer, model_type, {**SIZES, **sizes}, metadata or {})
    for weight in tensors:
        kind = _format_of(weight, format, formats or {})
        values = _permuted(weight, model_type, {**SIZES, **sizes})
        rows = values.reshape(-1, values.shape[-1])
        data = pack(rows, kind).reshape(*weight.values.shape[:-1], -1)
        writer.add_tensor(weight.gguf, data, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if parts > 1:
        return file.with_name(f"{file.stem}-00001-of-{parts:05}.gguf")
    return file


def _permuted(weight: Weight, model_type: str, s: dict[str, int]) -> np.ndarray:
    """GGUF's llama family has the two values that rotate together side by side."""
    heads = {"attn_q": s["heads"], "attn_k": s["kv_heads"]}.get(weight.gguf.split(".")[-2])
    if model_type not in ("llama", "mixtral") or heads is None:
        return weight.values
    halves = weight.values.reshape(heads, 2, s["head_dim"] // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.values.shape)


def _fused(tensors: list[Weight]) -> Any:
    """All experts of a layer as one tensor [experts, rows, columns]."""
    groups: dict[str, list[np.ndarray]] = {}
    for weight in tensors:
        if not weight.gguf:
            parts = weight.hf.split(".")
            part = dict(w1="gate", w3="up", w2="down").get(parts[-2], parts[-2].split("_")[0])
            name = f"blk.{parts[2]}.ffn_{part}_exps.weight"
            groups.setdefault(name, []).append(weight.values)
    for name, values in groups.items():
        yield Weight("", name, np.stack(values))


def _format_of(weight: Weight, format: str, formats: dict[str, str]) -> str:
    if weight.values.ndim == 1 or "ffn_gate_inp" in weight.gguf:
        return "f32"  # as llama.cpp does: norms, biases and routers
    return next((kind for part, kind in formats.items() if part in weight.gguf), format)


def _write_metadata(writer: Any, model_type: str, s: dict[str, int], more: dict[str, Any]) -> None:
    writer.add_context_length(s["context"])
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head_dim"])
    writer.add_value_length(s["head_dim"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    if model_type == "llama":
        writer.add_feed_forward_length(s["ffn_size"])
    else:
        writer.add_expert_count(s["experts"])
        writer.add_expert_used_count(s["top_k"])
        writer.add_feed_forward_length(s["expert_size"])
    if model_type in ("qwen2_moe", "qwen3_moe"):
        writer.add_expert_feed_forward_length(s["expert_size"])
    if model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(s["shared_size"])
    for key, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{writer.arch}.{key}", value)
    tokens, merges = vocabulary(s["vocab"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
