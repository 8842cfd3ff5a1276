"""Architectures: one file each, named after config.json's `model_type`.

A file has `GGUF_ARCHITECTURE` and `HAS_EXPERTS` (together they name it in GGUF), `HF_NAMES` and
`GGUF_NAMES` (its tensors, see tiered.checkpoints.tensor_names), `from_hf(facts)` and
`from_gguf(facts)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.rope import rope_from_gguf, rope_from_hf
from tiered.config import ModelConfig


class Architecture(Protocol):
    GGUF_ARCHITECTURE: str
    HAS_EXPERTS: bool
    HF_NAMES: Mapping[str, str]
    GGUF_NAMES: Mapping[str, str]

    def from_hf(self, facts: Facts) -> ModelConfig: ...

    def from_gguf(self, facts: Facts) -> ModelConfig: ...


def names() -> list[str]:
    return [module.name for module in iter_modules(__path__)]


def find(model_type: str, source: Path) -> Architecture:
    """The architecture that config.json calls `model_type`."""
    if model_type not in names():
        raise CheckpointError(
            f"{source}: unknown model_type {model_type!r}; known: {', '.join(names())}"
        )
    return cast(Architecture, import_module(f"{__name__}.{model_type}"))


def find_gguf(metadata: Mapping[str, Any], source: Path) -> tuple[Architecture, Facts]:
    """The architecture of a GGUF file, and its facts."""
    name = Facts(metadata, source).text("general.architecture")
    facts = Facts(metadata, source, name + ".")
    has_experts = facts.integer("expert_count", default=0) > 0
    known = [find(model_type, source) for model_type in names()]
    for architecture in known:
        if (name, has_experts) == (architecture.GGUF_ARCHITECTURE, architecture.HAS_EXPERTS):
            return architecture, facts
    listed = ", ".join(sorted({architecture.GGUF_ARCHITECTURE for architecture in known}))
    kind = "with" if has_experts else "without"
    raise CheckpointError(
        f"{source}: unknown architecture {name!r} {kind} experts; known: {listed}"
    )


def read_config(reader: Callable[[Facts], ModelConfig], facts: Facts) -> ModelConfig:
    """What `reader` (a from_hf or from_gguf) makes of the facts; nonsense names the file."""
    try:
        return reader(facts)
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{facts.source}: {error}") from error


def hf_common(facts: Facts, theta: float = 10_000.0, pairs: str = "half") -> dict[str, Any]:
    """Fields of ModelConfig that all config.json files spell alike."""
    activation = facts.text("hidden_act", default="silu")
    if activation not in ("silu", "swish"):
        raise facts.error("hidden_act", activation, "silu")
    hidden_size = facts.integer("hidden_size")
    num_heads = facts.integer("num_attention_heads")
    head_dim = hidden_size // max(num_heads, 1)
    head_dim = facts.integer("head_dim", default=head_dim, maximum=2**16)
    context_length = facts.integer("max_position_embeddings")
    return {
        "num_layers": facts.integer("num_hidden_layers", maximum=2**16),
        "hidden_size": hidden_size,
        "vocab_size": facts.integer("vocab_size"),
        "context_length": context_length,
        "num_heads": num_heads,
        "num_kv_heads": facts.integer("num_key_value_heads", default=num_heads),
        "head_dim": head_dim,
        "norm_eps": facts.number("rms_norm_eps"),
        "rope": replace(rope_from_hf(facts, head_dim, context_length, theta), pairs=pairs),
        "eos_ids": facts.integers("eos_token_id"),
    }


def hf_experts(facts: Facts) -> dict[str, Any]:
    """Number of experts, however it is spelled."""
    names = "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"
    return {
        "num_experts": facts.integer(*names, maximum=2**16),
        "top_k": facts.integer("num_experts_per_tok", "moe_k", maximum=2**16),
    }


def hf_deepseek_router(facts: Facts) -> dict[str, Any]:
    """DeepSeek-V3's way to choose experts: by groups, and weighted by a sigmoid."""
    return {
        "router_scoring": "sigmoid",
        "normalize_top_k": facts.flag("norm_topk_prob", default=True),
        "routing_scale": facts.number("routed_scaling_factor", default=1.0),
        "expert_groups": facts.integer("n_group", default=1),
        "used_groups": facts.integer("topk_group", default=1),
    }


def hf_leading_dense_layers(facts: Facts, default: int) -> frozenset[int]:
    """The first layers, which have no experts."""
    return frozenset(range(facts.integer("first_k_dense_replace", default=default, maximum=2**16)))


def hf_dense_layers(facts: Facts) -> frozenset[int]:
    """Layers without experts, by `decoder_sparse_step` and `mlp_only_layers`."""
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    step = max(facts.integer("decoder_sparse_step", default=1), 1)
    skipped = {layer for layer in range(num_layers) if (layer + 1) % step}
    return frozenset(skipped.union(facts.integers("mlp_only_layers")))


def hf_full_layers(facts: Facts, period: int) -> frozenset[int]:
    """Layers without the sliding window: those that `layer_types` says, or every `period`-th."""
    num_layers = facts.integer("num_hidden_layers", maximum=2**16)
    types = facts.find("layer_types", default=None)
    if types is None:
        return frozenset(range(period - 1, num_layers, period))
    known = ["sliding_attention", "full_attention"]
    if not isinstance(types, list) or len(types) < num_layers or any(t not in known for t in types):
        raise facts.error("layer_types", types, f"{' or '.join(known)} for each layer")
    return frozenset(i for i in range(num_layers) if types[i] == "full_attention")


def gguf_common(facts: Facts, pairs: str) -> dict[str, Any]:
    """Fields of ModelConfig that all GGUF architectures spell alike."""
    hidden_size = facts.integer("embedding_length")
    num_heads = facts.integer("attention.head_count")
    head_dim = hidden_size // max(num_heads, 1)
    head_dim = facts.integer("attention.key_length", default=head_dim, maximum=2**16)
    if facts.integer("attention.value_length", default=head_dim) != head_dim:
        raise facts.error("attention.value_length", "another", f"{head_dim}, as key_length")
    context_length = facts.integer("context_length")
    tokenizer = Facts(facts.values, facts.source, "tokenizer.ggml.")
    ends = (tokenizer.integers(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return {
        "num_layers": gguf_num_layers(facts),
        "hidden_size": hidden_size,
        "vocab_size": facts.integer("vocab_size"),
        "context_length": context_length,
        "num_heads": num_heads,
        "num_kv_heads": facts.integer("attention.head_count_kv", default=num_heads),
        "head_dim": head_dim,
        "norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "rope": rope_from_gguf(facts, head_dim, context_length, pairs),
        "eos_ids": tuple(dict.fromkeys(token for ids in ends for token in ids)),
    }


def gguf_num_layers(facts: Facts) -> int:
    """Without the layers that draft tokens, which are counted at the end."""
    count = facts.integer("block_count", maximum=2**16)
    return max(count - facts.integer("nextn_predict_layers", default=0), 0)


def gguf_experts(
    facts: Facts, normalize_top_k: bool, scoring: str = "softmax"
) -> dict[str, Any]:
    """Fields of the router. `scoring` is what the architecture does if the file says nothing."""
    number = facts.integer("expert_gating_func", default=0)
    if number > 2:
        raise facts.error("expert_gating_func", number, "1 (softmax) or 2 (sigmoid)")
    return {
        "router_scoring": (scoring, "softmax", "sigmoid")[number],
        "routing_scale": facts.number("expert_weights_scale", default=0.0) or 1.0,
        "expert_groups": facts.integer("expert_group_count", default=0) or 1,
        "used_groups": facts.integer("expert_group_used_count", default=0) or 1,
        "dense_layers": frozenset(range(facts.integer("leading_dense_block_count", default=0, maximum=2**16))),
        "num_experts": facts.integer("expert_count", maximum=2**16),
        "top_k": facts.integer("expert_used_count", maximum=2**16),
        "normalize_top_k": facts.flag("expert_weights_norm", default=normalize_top_k),
    }
