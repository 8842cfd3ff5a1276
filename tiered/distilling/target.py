"""Target: what a checkpoint is to be distilled into, and whether that can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tiered import models
from tiered.checkpoints.checkpoint import Checkpoint, CheckpointError
from tiered.checkpoints.facts import Facts
from tiered.checkpoints.json_file import read_json
from tiered.config import ModelConfig
from tiered.formats import open_checkpoint
from tiered.weights.prune import check_prunable, check_sparse, with_experts

FLOATS = "f32", "f16", "bf16"
# What experts may have that the training does not: ModelConfig's field, what it must be.
PLAIN: Mapping[str, Any] = {
    "activation": "silu",
    "expert_biases": False,
    "weighted_inputs": False,
    "output_norms": False,
    "expert_scales": False,
    "expert_groups": 1,
}
SCORINGS = "softmax", "sigmoid"
# What a dense model does not have. Everything else must be as it was.
SPARSE_FACTS: Mapping[str, Any] = {
    "num_experts": 0,
    "top_k": 0,
    "expert_size": 0,
    "shared_expert_size": 0,
    "dense_layers": frozenset(),
    "normalize_top_k": True,
    "routing_scale": 1.0,
    "router_scoring": "softmax",
    "used_groups": 1,
}
# What a dense model's config.json has of the source's.
KEPT_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "hidden_act", "tie_word_embeddings", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
)  # fmt: skip


class Target(NamedTuple):
    teacher: ModelConfig
    student: ModelConfig
    config_json: dict[str, Any]  # the student's

    @property
    def is_dense(self) -> bool:
        return not self.student.sparse_layers

    @property
    def layers(self) -> list[int]:
        """Those that are trained."""
        return self.teacher.sparse_layers


def experts_target(source: Path, destination: Path, num_experts: int) -> Target:
    """`num_experts` instead of the source's. ValueError or FileExistsError if that cannot be."""
    check_prunable(source, destination, num_experts, "distilled")
    with open_checkpoint(source) as checkpoint:
        _check_experts(checkpoint)
        teacher = checkpoint.config
    student = replace(teacher, num_experts=num_experts)
    return Target(teacher, student, with_experts(source, num_experts))


def dense_target(source: Path, destination: Path, ffn_size: int | None) -> Target:
    """One feed-forward of `ffn_size` neurons (None: as many as a token uses) instead of experts,
    in a dense architecture whose attention is the source's."""
    check_sparse(source, destination, "distilled")
    with open_checkpoint(source) as checkpoint:
        _check_experts(checkpoint)
        teacher, biased = checkpoint.config, "layers.0.q_bias" in checkpoint.tensors
    size = _ffn_size(source, teacher, ffn_size)
    values = read_json(source / "config.json")
    facts = {name: values[name] for name in KEPT_KEYS if name in values}
    facts |= {"intermediate_size": size, "attention_bias": biased}
    wanted = replace(teacher, ffn_size=size, **SPARSE_FACTS)
    for name in models.names():
        architecture = models.find(name, source)
        if architecture.HAS_EXPERTS:
            continue
        config_json = {"architectures": [_class_name(name)], "model_type": name, **facts}
        found = Facts(config_json, source / "config.json")
        try:
            student = models.read_config(architecture.from_hf, found)
        except CheckpointError:
            continue
        eos_ids = teacher.eos_ids  # some of them come from another file
        if replace(student, eos_ids=eos_ids) == replace(wanted, model_type=name):
            return Target(teacher, student, config_json)
    raise ValueError(
        f"{source} cannot become dense: no dense architecture known here has the attention of "
        f"{teacher.model_type}; distill it into fewer --experts"
    )


def _class_name(model_type: str) -> str:
    """As transformers calls it."""
    return "".join(part.capitalize() for part in model_type.split("_")) + "ForCausalLM"


def _ffn_size(source: Path, teacher: ModelConfig, chosen: int | None) -> int:
    most = teacher.num_experts * teacher.expert_size + teacher.shared_expert_size
    if teacher.dense_layers:  # which stay: all layers have one width
        if chosen not in (None, teacher.ffn_size):
            raise ValueError(
                f"{source} has dense layers already, whose width all must have: --ffn-size "
                f"{teacher.ffn_size}, not {chosen}"
            )
        chosen = teacher.ffn_size
    if chosen is not None and chosen > most:
        raise ValueError(
            f"a feed-forward of {chosen} neurons (--ffn-size) is more than all experts of {source} "
            f"together have: {most}"
        )
    return chosen or min(most, teacher.top_k * teacher.expert_size + teacher.shared_expert_size)


def _check_experts(checkpoint: Checkpoint) -> None:
    """ValueError if the training could not compute the source's experts as they are."""
    config, path = checkpoint.config, checkpoint.path
    if "quantization_config" in checkpoint.metadata:
        raise ValueError(
            f"{path} is quantized, and training needs floats: distill the model's original "
            "checkpoint"
        )
    odd = [name for name, value in PLAIN.items() if getattr(config, name) != value]
    if config.router_scoring not in SCORINGS:
        odd.append("router_scoring")
    if odd:
        raise ValueError(
            f"{path} ({config.model_type}) cannot be distilled: training does not know its "
            f"{' and '.join(name.replace('_', ' ') for name in odd)}"
        )
    layer = config.sparse_layers[0]
    names = [f"layers.{layer}.router"]
    names += [f"layers.{layer}.experts.0.{part}" for part in ("gate", "up", "down")]
    for name in names:
        tensor = checkpoint.tensors[name]
        if tensor.format not in FLOATS or tensor.packed is not None:
            raise ValueError(f"{path}: {name} is stored as {tensor.format}, which is not trained")
    if any(name.endswith("router_bias") for name in checkpoint.tensors):
        raise ValueError(f"{path} cannot be distilled: training does not know biases of routers")
