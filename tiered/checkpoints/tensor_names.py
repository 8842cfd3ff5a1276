"""Tensor names: from Hugging Face's and GGUF's to the canonical ones.

Tables map a stored name to a canonical one; `{}` stands for a number (layer, then expert). A
canonical name with `experts.*` is a 3-D tensor [num_experts, rows, columns] that is cut into its
experts. `gate|up` says that the rows of each are those two matrices, one after the other, `gate/up`
that they alternate, and `^T` at the end that the file has the matrices transposed. Without `*`, it
is the columns of a matrix that alternate. `drafts.*` are layers after the model's last one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import CheckpointError, Tensor
from tiered.checkpoints.packed import matrix_of, take_rows, transposed
from tiered.config import ModelConfig

Names = Mapping[str, str]

PROJECTIONS = "gate", "up", "down"


def _layers(prefix: str, names: Names) -> dict[str, str]:
    return {f"{prefix}.{{}}.{old}": f"layers.{{}}.{new}" for old, new in names.items()}


def with_text_part(names: Names) -> Names:
    """Also as the text part of a model that sees images has them."""
    prefix = "model."
    return {
        **names,
        **{
            f"{prefix}language_{name}": canonical
            for name, canonical in names.items()
            if name.startswith(prefix)
        },
    }


HF_BASE: Names = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "norm",
    "lm_head.weight": "head",
} | _layers(
    "model.layers",
    {
        "input_layernorm.weight": "attention_norm",
        "post_attention_layernorm.weight": "ffn_norm",
        "self_attn.q_proj.weight": "q",
        "self_attn.k_proj.weight": "k",
        "self_attn.v_proj.weight": "v",
        "self_attn.o_proj.weight": "o",
        "self_attn.q_proj.bias": "q_bias",
        "self_attn.k_proj.bias": "k_bias",
        "self_attn.v_proj.bias": "v_bias",
        "self_attn.o_proj.bias": "o_bias",
        "self_attn.q_norm.weight": "q_norm",
        "self_attn.k_norm.weight": "k_norm",
        "self_attn.sinks": "sinks",
        "self_attn.q_a_proj.weight": "q_a",
        "self_attn.q_a_layernorm.weight": "q_a_norm",
        "self_attn.q_b_proj.weight": "q",
        "self_attn.kv_a_proj_with_mqa.weight": "kv_a",
        "self_attn.kv_a_layernorm.weight": "kv_a_norm",
        "self_attn.kv_b_proj.weight": "kv_b",
    },
)
HF_DENSE: Names = _layers(
    "model.layers",
    {f"mlp.{name}_proj.weight": f"ffn.{name}" for name in PROJECTIONS},
)
HF_EXPERTS: Names = _layers(
    "model.layers",
    {"mlp.gate.weight": "router"}
    | {f"mlp.experts.{{}}.{name}_proj.weight": f"experts.{{}}.{name}" for name in PROJECTIONS}
    | {
        "mlp.experts.gate_up_proj": "experts.*.gate|up",
        "mlp.experts.down_proj": "experts.*.down",
    },
)
HF_SHARED_EXPERTS: Names = _layers(  # several, which are one as wide as all of them
    "model.layers",
    {f"mlp.shared_experts.{name}_proj.weight": f"shared.{name}" for name in PROJECTIONS},
)
HF_SHARED: Names = _layers(
    "model.layers",
    {"mlp.shared_expert_gate.weight": "shared.scale"}
    | {f"mlp.shared_expert.{name}_proj.weight": f"shared.{name}" for name in PROJECTIONS},
)

HF_DRAFTS: Names = _layers(  # DeepSeek's, in the layer after the last one
    "model.layers",
    {
        "enorm.weight": "mtp.embedding_norm",
        "hnorm.weight": "mtp.hidden_norm",
        "eh_proj.weight": "mtp.projection",
        "shared_head.norm.weight": "mtp.norm",
    },
)

HF_DRAFT_HEAD: Names = _layers("model.layers", {"shared_head.head.weight": "mtp.head"})

HF_DELTA: Names = _layers(
    "model.layers",
    {
        "linear_attn.in_proj_qkvz.weight": "delta.qkvz",
        "linear_attn.in_proj_qkv.weight": "delta.qkv",
        "linear_attn.in_proj_z.weight": "delta.z",
        "linear_attn.in_proj_ba.weight": "delta.ba",
        "linear_attn.in_proj_b.weight": "delta.b",
        "linear_attn.in_proj_a.weight": "delta.a",
        "linear_attn.conv1d.weight": "delta.conv",
        "linear_attn.dt_bias": "delta.dt_bias",
        "linear_attn.A_log": "delta.a_log",
        "linear_attn.norm.weight": "delta.norm",
        "linear_attn.out_proj.weight": "delta.o",
    },
)
GGUF_DELTA: Names = _layers(
    "blk",
    {
        "ssm_in.weight": "delta.qkvz",
        "attn_qkv.weight": "delta.qkv",
        "attn_gate.weight": "delta.z",
        "ssm_ba.weight": "delta.ba",
        "ssm_beta.weight": "delta.b",
        "ssm_alpha.weight": "delta.a",
        "ssm_conv1d.weight": "delta.conv",
        "ssm_dt.bias": "delta.dt_bias",
        "ssm_a": "delta.decay",
        "ssm_norm.weight": "delta.norm",
        "ssm_out.weight": "delta.o",
        "post_attention_norm.weight": "ffn_norm",
    },
)

HF_MAMBA2: Names = _layers(
    "model.layers",
    {
        "mamba.in_proj.weight": "mamba2.in",
        "mamba.conv1d.weight": "mamba2.conv",
        "mamba.conv1d.bias": "mamba2.conv_bias",
        "mamba.dt_bias": "mamba2.dt_bias",
        "mamba.A_log": "mamba2.a_log",
        "mamba.D": "mamba2.skip",
        "mamba.norm.weight": "mamba2.norm",
        "mamba.out_proj.weight": "mamba2.o",
    },
)
GGUF_MAMBA2: Names = _layers(
    "blk",
    {
        "ssm_in.weight": "mamba2.in",
        "ssm_conv1d.weight": "mamba2.conv",
        "ssm_conv1d.bias": "mamba2.conv_bias",
        "ssm_dt.bias": "mamba2.dt_bias",
        "ssm_a": "mamba2.decay",
        "ssm_d": "mamba2.skip",
        "ssm_norm.weight": "mamba2.norm",
        "ssm_out.weight": "mamba2.o",
    },
)

GGUF: Names = {
    "token_embd.weight": "embed",
    "output_norm.weight": "norm",
    "output.weight": "head",
    "rope_freqs.weight": "rope_factors",
    "rope_factors_short.weight": "rope_factors_short",
    "rope_factors_long.weight": "rope_factors_long",
} | _layers(
    "blk",
    {
        "attn_norm.weight": "attention_norm",
        "attn_q.weight": "q",
        "attn_k.weight": "k",
        "attn_v.weight": "v",
        "attn_output.weight": "o",
        "attn_q.bias": "q_bias",
        "attn_k.bias": "k_bias",
        "attn_v.bias": "v_bias",
        "attn_output.bias": "o_bias",
        "attn_q_norm.weight": "q_norm",
        "attn_k_norm.weight": "k_norm",
        "attn_sinks.weight": "sinks",
        "attn_q_a.weight": "q_a",
        "attn_q_a_norm.weight": "q_a_norm",
        "attn_q_b.weight": "q",
        "attn_kv_a_mqa.weight": "kv_a",
        "attn_kv_a_norm.weight": "kv_a_norm",
        "attn_kv_b.weight": "kv_b",
        "attn_k_b.weight": "k_b",
        "attn_v_b.weight": "v_b",
        "ffn_norm.weight": "ffn_norm",
        "ffn_gate_inp.weight": "router",
        "ffn_gate_inp.bias": "router_bias",
        "exp_probs_b.bias": "router_correction",
        "ffn_gate_up_exps.weight": "experts.*.gate|up",
        "ffn_gate_inp_shexp.weight": "shared.scale",
    }
    | {f"ffn_{name}.weight": f"ffn.{name}" for name in PROJECTIONS}
    | {f"ffn_{name}.{{}}.weight": f"experts.{{}}.{name}" for name in PROJECTIONS}
    | {f"ffn_{name}_exps.weight": f"experts.*.{name}" for name in PROJECTIONS}
    | {f"ffn_{name}_exps.bias": f"experts_bias.{name}" for name in PROJECTIONS}
    | {f"ffn_{name}_shexp.weight": f"shared.{name}" for name in PROJECTIONS}
    | {
        "nextn.enorm.weight": "mtp.embedding_norm",
        "nextn.hnorm.weight": "mtp.hidden_norm",
        "nextn.eh_proj.weight": "mtp.projection",
        "nextn.shared_head_norm.weight": "mtp.norm",
        "nextn.shared_head_head.weight": "mtp.head",
    },
)

VECTORS = ".router_correction", "mamba2.decay", "mamba2.skip", "mamba2.norm"  # not in all files
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def drafting_layer(pattern: str, numbers: Sequence[int | str], num_layers: int) -> int | None:
    """Which of the layers that only draft tokens a tensor belongs to, from 0; None: to no such."""
    if pattern.startswith("drafts."):
        return int(numbers[0]) if numbers else 0
    if pattern.startswith("layers.") and int(numbers[0]) >= num_layers:
        return int(numbers[0]) - num_layers
    return None


def canonical_tensors(
    stored: Iterable[Tensor], names: Names, num_layers: int, drafts: bool = False
) -> dict[str, Tensor]:
    """The tensors that `names` knows, under their canonical names.

    Others are left out, as are layers beyond `num_layers`, which only draft tokens; with `drafts`,
    the first of these is layer `num_layers`.
    """
    tensors: dict[str, Tensor] = {}
    for tensor in stored:
        pattern = names.get(_NUMBER.sub("{}", tensor.name))
        if pattern is None:
            continue
        numbers = _NUMBER.findall(tensor.name)
        draft = drafting_layer(pattern, numbers, num_layers)
        if draft is not None and (draft > 0 or not drafts):
            continue
        if tensor.format not in FORMATS:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has type {tensor.format.upper()}, "
                f"which is not supported (supported: {', '.join(FORMATS).upper()})"
            )
        name = pattern.format(*numbers)
        if draft is not None:
            name = f"layers.{num_layers}.{name.split('.', 2)[2]}"
        if name.endswith(".shared.scale"):
            tensor = tensor._replace(shape=(1, tensor.shape[-1]))
        elif name.endswith(VECTORS):
            tensor = tensor._replace(shape=(math.prod(tensor.shape),))
        elif name.endswith(("k_b", "v_b", ".conv")) and len(tensor.shape) == 3:
            tensor = tensor._replace(shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
        for part in _parts(tensor, name):
            if part.name in tensors:
                raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} is there twice")
            tensors[part.name] = part
    return tensors


def _parts(tensor: Tensor, name: str) -> Iterator[Tensor]:
    """What a stored tensor has, each under its name."""
    name, _, is_transposed = name.partition("^")
    prefix, last = name.rsplit(".", 1) if "." in name else ("", name)
    names = re.split(r"[|/]", last)
    if "*" in prefix:
        matrices = _experts(tensor, prefix)
    elif len(names) > 1:
        matrices = iter([(prefix, _checked(tensor, 2))])
        is_transposed = "columns" if "/" in last else ""
    else:
        yield tensor._replace(name=name)
        return
    for owner, matrix in matrices:
        rows = transposed(matrix) if is_transposed else matrix
        count, remainder = divmod(rows.shape[0], len(names))
        if remainder:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, which "
                f"cannot be shared by {' and '.join(names)}"
            )
        for i, part in enumerate(names):
            start, step = (i, len(names)) if "/" in last else (i * count, 1)
            found = rows if len(names) == 1 else take_rows(rows, start, count, step)
            found = transposed(found) if is_transposed == "columns" else found
            yield found._replace(name=f"{owner}.{part}")


def _experts(tensor: Tensor, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a fused tensor, expert by expert."""
    _checked(tensor, 3)
    for expert in range(tensor.shape[0]):
        yield prefix.replace("*", str(expert)), matrix_of(tensor, expert)


def _checked(tensor: Tensor, num_dimensions: int) -> Tensor:
    if len(tensor.shape) != num_dimensions:
        expected = "[experts, rows, columns]" if num_dimensions == 3 else "[experts, columns]"
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but must be "
            f"{expected}"
        )
    return tensor


def with_drafts(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration with the layer that drafts tokens, if `tensors` have one."""
    layer = f"layers.{config.num_layers}"
    if f"{layer}.mtp.projection" not in tensors:
        return config
    dense = frozenset() if f"{layer}.router" in tensors else frozenset({config.num_layers})
    return replace(
        config,
        num_layers=config.num_layers + 1,
        num_draft_layers=1,
        dense_layers=config.dense_layers - {config.num_layers} | dense,
    )
