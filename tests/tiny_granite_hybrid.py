"""Granite with Mamba-2 in the place of attention in every second layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import tiny_granite
import tiny_granite_shared

HEADS, GROUPS, STATE = 4, 2, 16


def is_mamba(layer: int) -> bool:
    return layer % 2 == 0


def add_layer(w: Any, hf: str, gg: str, layer: int) -> None:
    if not is_mamba(layer):
        tiny_granite_shared.add_layer(w, hf, gg, layer)
        return
    before = len(w.found)
    tiny_granite_shared.add_layer(w, hf, gg, layer)
    w.found[before:] = [t for t in w.found[before:] if "self_attn" not in t.hf]
    hf, hidden, inner, rng = hf + "mamba.", w.s["hidden"], 2 * w.s["hidden"], w.rng
    channels = inner + 2 * GROUPS * STATE
    w.add(hf + "in_proj", gg + "ssm_in.weight", inner + channels + HEADS, hidden)
    w.add(hf + "out_proj", gg + "ssm_out.weight", hidden, inner)
    conv = w.matrix(channels, w.s["conv_size"])
    w.add_values(hf + "conv1d.weight", "", conv[:, None])
    w.add_values("", gg + "ssm_conv1d.weight", conv)
    w.add(hf + "conv1d.bias", gg + "ssm_conv1d.bias", channels)
    a = rng.uniform(0.05, 4, HEADS).astype(np.float32)
    w.add_values(hf + "A_log", "", np.log(a))
    w.add_values("", gg + "ssm_a", -a[:, None])
    w.add_values(hf + "dt_bias", gg + "ssm_dt.bias", rng.standard_normal(HEADS, np.float32))
    skip = rng.standard_normal(HEADS, np.float32)
    w.add_values(hf + "D", "", skip)
    w.add_values("", gg + "ssm_d", skip[:, None])
    norm = 1 + rng.standard_normal(inner, np.float32) / 10
    w.add_values(hf + "norm.weight", "", norm)
    w.add_values("", gg + "ssm_norm.weight", norm.reshape(GROUPS, -1))


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return tiny_granite_shared.hf_config(s) | dict(
        layer_types=["mamba" if is_mamba(i) else "attention" for i in range(s["layers"])],
        mamba_n_heads=HEADS, mamba_n_groups=GROUPS, mamba_d_state=STATE, mamba_expand=2,
        mamba_d_conv=s["conv_size"], position_embedding_type="nope",
    )  # fmt: skip


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    tiny_granite.write_metadata(
        writer, s, [0 if is_mamba(i) else s["kv_heads"] for i in range(s["layers"])]
    )
    writer.add_expert_shared_feed_forward_length(s["shared_size"])
    writer.add_rope_scaling_finetuned(False)
    writer.add_ssm_conv_kernel(s["conv_size"])
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_group_count(GROUPS)
    writer.add_ssm_time_step_rank(HEADS)
    writer.add_ssm_inner_size(2 * s["hidden"])
