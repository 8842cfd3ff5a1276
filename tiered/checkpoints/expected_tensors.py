"""The tensors that a model has, by what its configuration says: canonical names and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.config import ModelConfig

OUTPUT_NORMS = (
    "attention_out_norm",
    "shared.norm",
    "shared.out_norm",
    "experts_out_norm",
    "ffn_out_norm",
)
Expected = tuple[str, tuple[int, ...], bool]  # canonical name, shape, whether it must be there


def expected_tensors(config: ModelConfig) -> Iterator[Expected]:
    """All tensors of a model; lazily, since a damaged file may claim any number of layers."""
    hidden, expert_size = config.hidden_size, config.expert_size
    yield "embed", (config.vocab_size, hidden), True
    yield from _norm(config, "norm")
    yield "head", (config.vocab_size, hidden), False
    yield "head_bias", (config.vocab_size,), False
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        yield from _norm(config, f"{layer}.attention_norm")
        for name, shape, required in _in_place_of_attention(config, index):
            yield f"{layer}.{name}", shape, required
        yield from _norm(config, f"{layer}.ffn_norm")
        for name in OUTPUT_NORMS if config.output_norms else ():
            yield f"{layer}.{name}", (hidden,), True
        yield f"{layer}.scale", (1,), False
        if index >= config.num_layers - config.num_draft_layers:
            yield f"{layer}.mtp.embedding_norm", (hidden,), True
            yield f"{layer}.mtp.hidden_norm", (hidden,), True
            yield f"{layer}.mtp.projection", (hidden, 2 * hidden), True
            yield f"{layer}.mtp.norm", (hidden,), False
            yield f"{layer}.mtp.head", (config.vocab_size, hidden), False
        if not config.is_sparse(index):
            yield from _feed_forward(f"{layer}.ffn", hidden, config.ffn_size)
            continue
        yield f"{layer}.router", (config.num_experts, hidden), True
        yield f"{layer}.router_bias", (config.num_experts,), False
        yield f"{layer}.router_correction", (config.num_experts,), False
        yield f"{layer}.router_norm", (hidden,), False
        yield f"{layer}.router_scales", (config.num_experts,), config.expert_scales
        if config.expert_biases:
            for name, size in ("gate", expert_size), ("up", expert_size), ("down", hidden):
                yield f"{layer}.experts_bias.{name}", (config.num_experts, size), True
        for expert in range(config.num_experts):
            yield from _feed_forward(f"{layer}.experts.{expert}", hidden, config.expert_size)
        if config.shared_expert_size:
            yield from _feed_forward(f"{layer}.shared", hidden, config.shared_expert_size)
            yield f"{layer}.shared.scale", (1, hidden), False


def _norm(config: ModelConfig, name: str) -> Iterator[Expected]:
    yield name, (config.hidden_size,), True
    if config.layer_norms:
        yield f"{name}_bias", (config.hidden_size,), True


def _in_place_of_attention(config: ModelConfig, index: int) -> Iterator[Expected]:
    if index in config.delta_layers:
        return _delta(config)
    if index in config.conv_layers:
        return _conv(config)
    if index in config.mamba2_layers:
        return _mamba2(config)
    return _latent_attention(config) if config.latent.kv_rank else _attention(config, index)


def _attention(config: ModelConfig, index: int) -> Iterator[Expected]:
    """Where layers differ, those with the other shape may make values of the matrix for keys."""
    hidden, shape = config.hidden_size, config.attention_shape(index)
    head_dim = shape.head_dim
    q_size, kv_size = config.num_heads * head_dim, shape.num_kv_heads * head_dim
    gates = q_size if config.gated_attention else 0  # head by head: queries, then gates
    for name, size in ("q", q_size + gates), ("k", kv_size), ("v", kv_size):
        yield name, (size, hidden), name != "v" or shape is not config.full_shape
        yield f"{name}_bias", (size,), False
    yield "o", (hidden, q_size), True
    yield "o_bias", (hidden,), False
    if config.qk_norm in ("head", "full"):
        full = config.qk_norm == "full"
        yield "q_norm", (q_size if full else head_dim,), True
        yield "k_norm", (kv_size if full else head_dim,), True
    if config.attention_sinks:
        yield "sinks", (config.num_heads,), True


def _latent_attention(config: ModelConfig) -> Iterator[Expected]:
    """`kv_b` has rows of each head's keys, then of its values; or there are `k_b` and `v_b`."""
    c, heads, hidden = config.latent, config.num_heads, config.hidden_size
    q_size = heads * (c.nope_dim + c.rope_dim)
    if c.q_rank:
        yield "q_a", (c.q_rank, hidden), True
        yield "q_a_norm", (c.q_rank,), True
    yield "q", (q_size, c.q_rank or hidden), True
    yield "kv_a", (c.kv_rank + c.rope_dim, hidden), True
    yield "kv_a_norm", (c.kv_rank,), True
    yield "kv_b", (heads * (c.nope_dim + c.value_dim), c.kv_rank), False
    yield "k_b", (heads * c.kv_rank, c.nope_dim), False
    yield "v_b", (heads * c.value_dim, c.kv_rank), False
    yield "o", (hidden, heads * c.value_dim), True


def _delta(config: ModelConfig) -> Iterator[Expected]:
    """Gated DeltaNet. Of `qkv` and `z`, and of `b` and `a`, some files have the rows together,
    mixed by heads of keys; and some have A instead of its logarithm."""
    d, hidden = config.delta, config.hidden_size
    values, heads = d.num_value_heads * d.value_dim, d.num_value_heads
    yield "delta.qkvz", (d.channels + values, hidden), False
    yield "delta.qkv", (d.channels, hidden), False
    yield "delta.z", (values, hidden), False
    yield "delta.ba", (2 * heads, hidden), False
    yield "delta.b", (heads, hidden), False
    yield "delta.a", (heads, hidden), False
    yield "delta.conv", (d.channels, d.conv_size), True
    yield "delta.dt_bias", (heads,), True
    yield "delta.a_log", (heads,), False
    yield "delta.decay", (heads,), False
    yield "delta.norm", (d.value_dim,), True
    yield "delta.o", (hidden, values), True


def _conv(config: ModelConfig) -> Iterator[Expected]:
    hidden = config.hidden_size
    yield "conv.gates", (3 * hidden, hidden), True
    yield "conv.conv", (hidden, config.conv_size), True
    yield "conv.o", (hidden, hidden), True


def _mamba2(config: ModelConfig) -> Iterator[Expected]:
    """The rows of `in` are gates, what is convolved, and steps. Some files have A instead of its
    logarithm."""
    m, hidden = config.mamba2, config.hidden_size
    yield "mamba2.in", (m.inner_size + m.channels + m.num_heads, hidden), True
    yield "mamba2.conv", (m.channels, m.conv_size), True
    yield "mamba2.conv_bias", (m.channels,), False
    yield "mamba2.dt_bias", (m.num_heads,), True
    yield "mamba2.a_log", (m.num_heads,), False
    yield "mamba2.decay", (m.num_heads,), False
    yield "mamba2.skip", (m.num_heads,), True
    yield "mamba2.norm", (m.inner_size,), True
    yield "mamba2.o", (hidden, m.inner_size), True


def _feed_forward(prefix: str, hidden: int, size: int) -> Iterator[Expected]:
    yield f"{prefix}.gate", (size, hidden), True
    yield f"{prefix}.up", (size, hidden), True
    yield f"{prefix}.down", (hidden, size), True


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor the model needs is there and has the shape that its configuration says."""
    for name, shape, required in expected_tensors(config):
        tensor = tensors.get(name)
        if tensor is None and required:
            raise CheckpointError(
                f"{path}: tensor {name!r} is missing; the file is incomplete or its "
                f"{config.model_type} variant is not supported"
            )
        if tensor is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, but the "
                f"model's configuration says {list(shape)}"
            )
