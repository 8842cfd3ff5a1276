"""Tiny random Hugging Face folders of every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pack import bf16
from tiny_weights import (
    KINDS,
    NUM_SHARED,
    SIZES,
    YARN,
    Kind,
    Weight,
    weights,
)


def hf_config(model_type: str, **sizes: Any) -> dict[str, Any]:
    s, kind = {**SIZES, **sizes}, KINDS[model_type]
    config = dict(
        model_type=model_type, vocab_size=s["vocab"], hidden_size=s["hidden"],
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"], head_dim=s["head_dim"], rms_norm_eps=1e-5,
        max_position_embeddings=s["context"], rope_theta=10_000.0, hidden_act="silu",
        tie_word_embeddings=False, eos_token_id=s["vocab"] - 1,
    )  # fmt: skip
    if kind.latent:
        config |= dict(
            kv_lora_rank=s["kv_rank"], q_lora_rank=s["q_rank"] if kind.latent == 2 else None,
            v_head_dim=s["value_dim"],
            qk_nope_head_dim=s["nope_dim"], qk_rope_head_dim=s["rope_dim"], head_dim=s["rope_dim"],
            num_key_value_heads=s["heads"],
        )  # fmt: skip
    config |= kind.own.hf_config(s) if kind.own else _hf_feed_forward(model_type, kind, s)
    if kind.delta:
        config |= dict(
            linear_num_key_heads=s["key_heads"], linear_num_value_heads=s["value_heads"],
            linear_key_head_dim=s["delta_dim"], linear_value_head_dim=s["delta_dim"],
            linear_conv_kernel_dim=s["conv_size"], full_attention_interval=2,
            partial_rotary_factor=0.25,
        )  # fmt: skip
    if s["drafts"] and not kind.delta:
        config |= dict(num_nextn_predict_layers=1)
    if model_type in ("qwen3_5_moe", "gemma4", "llama4", "qwen3_vl_moe"):  # which also see images
        text = config | dict(model_type=f"{model_type}_text")
        return dict(model_type=model_type, text_config=text, tie_word_embeddings=False)
    return config


def _hf_feed_forward(model_type: str, kind: Kind, s: dict[str, int]) -> dict[str, Any]:
    """The entries of config.json that differ most between architectures."""
    if kind.experts is None:
        return dict(intermediate_size=s["ffn_size"])
    if model_type == "ernie4_5_moe":
        return dict(moe_num_experts=s["experts"], moe_k=s["top_k"], moe_layer_start_index=1,
                    moe_num_shared_experts=NUM_SHARED,
                    moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"],
                    rope_theta=10_000.0)  # fmt: skip
    config: dict[str, Any] = dict(num_experts_per_tok=s["top_k"])
    local = model_type in ("mixtral", "minimax_m2", "gpt_oss")
    routed = kind.shared == "shared_experts."
    name = "num_local_experts" if local else "n_routed_experts" if routed else "num_experts"
    config[name] = s["experts"]
    if model_type in ("mixtral", "olmoe", "minimax_m2", "gpt_oss"):
        config |= dict(intermediate_size=s["expert_size"])
    else:
        config |= dict(moe_intermediate_size=s["expert_size"], intermediate_size=s["ffn_size"])
    if kind.gated_shared:
        config |= dict(shared_expert_intermediate_size=s["shared_size"])
    if model_type == "qwen3_moe":
        config |= dict(norm_topk_prob=True)
    if model_type == "gpt_oss":
        config |= dict(sliding_window=24, rope_parameters=dict(YARN, rope_theta=10_000.0))
    if kind.half_rope:
        config |= dict(partial_rotary_factor=0.5)
    if routed:
        config |= dict(n_shared_experts=NUM_SHARED, first_k_dense_replace=len(kind.dense),
                       routed_scaling_factor=1.5)  # fmt: skip
    if kind.correction and routed:
        config |= dict(n_group=4, topk_group=2, norm_topk_prob=True)
    if model_type == "glm4_moe":
        config |= dict(use_qk_norm=True, attention_bias=True)
    return config


def hf_checkpoint(
    folder: Path, model_type: str = "mixtral", dtype: str = "bf16", seed: int = 0,
    num_files: int = 1, tokenizer: bool = False, config: dict[str, Any] | None = None,
    change: Callable[[Weight], Weight] = lambda weight: weight, **sizes: int,
) -> Path:  # fmt: skip
    """A folder with config.json and safetensors; `config` changes or adds entries of the former,
    `change` the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    values = hf_config(model_type, **sizes) | (config or {})
    (folder / "config.json").write_text(json.dumps(values))
    tensors = weights(model_type, seed, values["tie_word_embeddings"], **sizes)
    tensors = [change(weight) for weight in tensors if weight.hf]
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
    """Floats become `dtype`; integers stay what they are, and uint8 of the type named with it."""
    kinds = {"bf16": bf16, "f16": np.float16, "f32": np.float32}
    integers = {"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, values in tensors.items():
        stored = integers.get(values.dtype.name)
        parts.append(np.asarray(values if stored else kinds[dtype](values)).tobytes())
        end = offset + len(parts[-1])
        name, _, named = name.partition(" as ")
        header[name] = dict(
            dtype=named or stored or dtype.upper(),
            shape=list(values.shape),
            data_offsets=[offset, end],
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
