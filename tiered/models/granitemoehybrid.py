"""Granite 4.0-H with experts (Tiny and Small): Granite's layers, most of which have Mamba-2 in the
place of attention; positions need no rotary embedding then."""

from __future__ import annotations

import math
from dataclasses import replace

from tiered.checkpoints.facts import Facts
from tiered.checkpoints.gguf_config import gguf_hybrid
from tiered.checkpoints.tensor_names import GGUF, GGUF_MAMBA2, HF_MAMBA2, Names
from tiered.config import Mamba2Config, ModelConfig
from tiered.models import granitemoe

GGUF_ARCHITECTURE = "granitehybrid"
HAS_EXPERTS = True
HF_NAMES: Names = {**granitemoe.HF_NAMES, **HF_MAMBA2}
GGUF_NAMES: Names = {**GGUF, **GGUF_MAMBA2}
# transformers has its own way to write what JSON has no number for.
NO_LIMIT = None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]
KINDS = {"mamba": True, "linear_attention": True, "attention": False, "full_attention": False}


def from_hf(facts: Facts) -> ModelConfig:
    if facts.integer("num_local_experts", default=0) == 0:
        raise facts.error("num_local_experts", 0, "at least 1: it has to have experts")
    if facts.flag("mamba_proj_bias", default=False):
        raise facts.error("mamba_proj_bias", True, "false")
    if (limit := facts.find("time_step_limit", default=None)) not in NO_LIMIT:
        raise facts.error("time_step_limit", limit, "[0, Infinity] (or absent)")
    position = facts.find("position_embedding_type", default="nope")
    if position not in ("nope", "rope"):
        raise facts.error("position_embedding_type", position, "'nope' or 'rope'")
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    types = facts.find("layer_types")
    if not isinstance(types, list) or len(types) != num_layers or set(types) - set(KINDS):
        raise facts.error("layer_types", types, "mamba or attention for each layer")
    return _hybrid(
        granitemoe.from_hf(facts),
        Mamba2Config(
            num_heads=facts.integer("mamba_n_heads", maximum=2**16),
            head_dim=_head_dim(facts),
            state_dim=facts.integer("mamba_d_state", maximum=2**16),
            num_groups=facts.integer("mamba_n_groups", default=1, maximum=2**16),
            conv_size=facts.integer("mamba_d_conv", default=4, maximum=64),
            norm_eps=facts.number("rms_norm_eps"),
        ),
        frozenset(layer for layer, kind in enumerate(types) if KINDS[kind]),
        rotates=position == "rope",
    )


def _head_dim(facts: Facts) -> int:
    heads = facts.integer("mamba_n_heads", maximum=2**16)
    inner = facts.integer("mamba_expand", default=2) * facts.integer("hidden_size")
    if facts.find("mamba_d_head", default="auto") == "auto":
        return inner // max(heads, 1)
    size = facts.integer("mamba_d_head", maximum=2**16)
    if heads * size != inner:
        raise facts.error("mamba_d_head", size, f"{inner} / {heads}, mamba_n_heads")
    return size


def from_gguf(facts: Facts) -> ModelConfig:
    attending, mamba2_layers = gguf_hybrid(facts)
    heads = facts.integer("ssm.time_step_rank", maximum=2**16)
    return _hybrid(
        granitemoe.from_gguf(attending),
        Mamba2Config(
            num_heads=heads,
            head_dim=facts.integer("ssm.inner_size") // max(heads, 1),
            state_dim=facts.integer("ssm.state_size", maximum=2**16),
            num_groups=facts.integer("ssm.group_count", maximum=2**16),
            conv_size=facts.integer("ssm.conv_kernel", maximum=64),
            norm_eps=facts.number("attention.layer_norm_rms_epsilon"),
        ),
        mamba2_layers,
        rotates=facts.flag("rope.scaling.finetuned", default=True),
    )


def _hybrid(
    config: ModelConfig, mamba: Mamba2Config, mamba2_layers: frozenset[int], rotates: bool
) -> ModelConfig:
    return replace(
        config,
        model_type="granitemoehybrid",
        mamba2=mamba,
        mamba2_layers=mamba2_layers,
        full_layers=frozenset(range(config.num_layers)) - mamba2_layers,
        full_layers_rotate=rotates,
    )
