"""Tiny random GGUF files of every architecture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_gemma4
import tiny_phimoe
from pack import pack
from tiny_hf import vocabulary
from tiny_plain import write_attention
from tiny_weights import (
    ADJACENT,
    K_QUANT_SIZES,
    KINDS,
    NUM_SHARED,
    SIZES,
    YARN,
    Kind,
    Weight,
    weights,
)


def gguf_checkpoint(
    file: Path, model_type: str = "mixtral", format: str = "q4_0", seed: int = 0,
    formats: dict[str, str] | None = None, parts: int = 1, tied: bool = False,
    metadata: dict[str, Any] | None = None, rope_factors: list[float] | None = None,
    **sizes: int,
) -> Path:  # fmt: skip
    """A GGUF file. `formats` says for parts of tensor names what differs from `format`.

    With several `parts` it is split, and the path of the first part is returned.
    """
    if any("_k" in f or f == "iq4_xs" for f in [format, *(formats or {}).values()]):
        sizes = {**K_QUANT_SIZES, **sizes}
    tensors = [w for w in weights(model_type, seed, tied, **sizes) if w.gguf]
    num_layers = {**SIZES, **sizes}["layers"]
    tensors += list(_fused(weights(model_type, seed, tied, **sizes), num_layers))
    if KINDS[model_type].own is tiny_gemma4:
        rope_factors = tiny_gemma4.rope_factors({**SIZES, **sizes}).tolist()
    if KINDS[model_type].own is tiny_phimoe:
        for name, values in tiny_phimoe.rope_factors({**SIZES, **sizes}).items():
            stored = f"rope_factors_{name}.weight"
            tensors.append(Weight("", stored, values.astype(np.float32)))
    if rope_factors is not None:
        factors = np.array(rope_factors, np.float32)
        tensors.append(Weight("", "rope_freqs.weight", factors))
    writer = gguf.GGUFWriter(
        file, KINDS[model_type].gguf,
        split_max_tensors=-(-len(tensors) // parts) if parts > 1 else 0,
    )  # fmt: skip
    write_metadata(writer, model_type, {**SIZES, **sizes}, metadata or {})
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
    if model_type not in ADJACENT or heads is None or weight.values.ndim == 1:
        return weight.values
    halves = weight.values.reshape(heads, 2, s["head_dim"] // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.values.shape)


def _fused(tensors: list[Weight], num_layers: int) -> Any:
    """All experts of a layer as one tensor [experts, rows, columns]."""
    groups: dict[str, list[np.ndarray]] = {}
    for weight in tensors:
        if re.search(r"\.experts\.\d", weight.hf):
            parts = weight.hf.replace("language_model.", "").split(".")
            part = dict(w1="gate", w3="up", w2="down").get(parts[-2], parts[-2].split("_")[0])
            layer = num_layers if parts[0] == "mtp" else parts[2]
            name = f"blk.{layer}.ffn_{part}_exps.weight"
            groups.setdefault(name, []).append(weight.values)
    for name, values in groups.items():
        yield Weight("", name, np.stack(values))


def _format_of(weight: Weight, format: str, formats: dict[str, str]) -> str:
    name = weight.gguf
    if (
        weight.values.ndim == 1
        or name.endswith("bias")
        or "ffn_gate_inp" in name
        or "conv1d" in name
        or "shortconv.conv" in name
        or name.endswith((".scale", "ssm_a", "ssm_d", "ssm_norm.weight"))
    ):
        return "f32"  # as llama.cpp does: norms, biases and routers
    return next((kind for part, kind in formats.items() if part in weight.gguf), format)


def write_metadata(writer: Any, model_type: str, s: dict[str, int], more: dict[str, Any]) -> None:
    writer.add_context_length(s["context"])
    writer.add_embedding_length(s["hidden"])
    writer.add_block_count(s["layers"] + s["drafts"])
    if s["drafts"]:
        writer.add_nextn_predict_layers(s["drafts"])
    writer.add_head_count(s["heads"])
    kind = KINDS[model_type]
    if kind.delta:
        _write_delta(writer, kind, s)
    if kind.latent:
        _write_latent(writer, kind, s)
    elif kind.own is not None:
        kind.own.write_metadata(writer, s)
    else:
        part = 4 if kind.delta else 2 if kind.half_rope else 1
        write_attention(writer, s, s["head_dim"] // part)
    writer.add_layer_norm_rms_eps(1e-5)
    if kind.own is None:
        writer.add_rope_freq_base(10_000.0)
    _write_feed_forward(writer, model_type, kind, s)
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


def _write_feed_forward(writer: Any, model_type: str, kind: Kind, s: dict[str, int]) -> None:
    if kind.own is None:
        is_dense = kind.dense or not kind.experts
        writer.add_feed_forward_length(s["ffn_size"] if is_dense else s["expert_size"])
    if kind.experts is None:
        return
    writer.add_expert_count(s["experts"])
    writer.add_expert_used_count(s["top_k"])
    if model_type not in ("mixtral", "olmoe"):
        writer.add_expert_feed_forward_length(s["expert_size"])
    if kind.gated_shared:
        writer.add_expert_shared_feed_forward_length(s["shared_size"])
    elif kind.shared:
        writer.add_expert_shared_count(NUM_SHARED)
        writer.add_leading_dense_block_count(len(kind.dense))
    if model_type == "ernie4_5_moe":
        writer.add_interleave_moe_layer_step(1)
        writer.add_expert_shared_feed_forward_length(NUM_SHARED * s["expert_size"])
    elif kind.shared == "shared_experts.":
        writer.add_expert_weights_scale(1.5)
    if kind.correction and model_type != "ernie4_5_moe":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
        if kind.shared == "shared_experts.":
            writer.add_expert_group_count(4)
            writer.add_expert_group_used_count(2)
    if kind.sinks:
        writer.add_sliding_window(24)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(YARN["factor"])
        writer.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"])


def _write_delta(writer: Any, kind: Kind, s: dict[str, int]) -> None:
    writer.add_ssm_conv_kernel(s["conv_size"])
    writer.add_ssm_state_size(s["delta_dim"])
    writer.add_ssm_group_count(s["key_heads"])
    writer.add_ssm_time_step_rank(s["value_heads"])
    writer.add_ssm_inner_size(s["value_heads"] * s["delta_dim"])
    writer.add_full_attention_interval(2)
    if kind.delta == "apart":
        writer.add_rope_dimension_sections([1, 1, 0, 0])


def _write_latent(writer: Any, kind: Kind, s: dict[str, int]) -> None:
    writer.add_head_count_kv(1)
    writer.add_key_length(s["kv_rank"] + s["rope_dim"])
    writer.add_value_length(s["kv_rank"])
    writer.add_key_length_mla(s["nope_dim"] + s["rope_dim"])
    writer.add_value_length_mla(s["value_dim"])
    writer.add_kv_lora_rank(s["kv_rank"])
    if kind.latent == 2:
        writer.add_q_lora_rank(s["q_rank"])
    writer.add_rope_dimension_count(s["rope_dim"])
