"""How the memory of one process is shared out: what is fixed, and what is left for expert slots."""

from __future__ import annotations

from dataclasses import dataclass

from tiered.config import ModelConfig
from tiered.memory import format_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `mapped`: all experts fit, and are computed from the file's memory map."""

    limit: int
    process: int  # the interpreter and its libraries
    dense: int  # attention, norms, routers, embeddings, head
    kv: int
    workspace: int
    experts: int  # all experts of the model
    slots: int  # what the expert slots may take
    mapped: bool

    @property
    def fixed(self) -> int:
        return self.process + self.dense + self.kv + self.workspace


def workspace_bytes(config: ModelConfig, chunk: int) -> int:
    """Scratch for `chunk` tokens at once: hidden states, projections, pair outputs, logits."""
    shapes = config.own_shape, config.full_shape or config.own_shape
    heads = max((config.num_heads + 2 * s.num_kv_heads) * s.head_dim for s in shapes)
    width = max(config.ffn_size, config.shared_expert_size, config.expert_size * config.top_k)
    per_token = 4 * (4 * config.hidden_size + 2 * heads + config.hidden_size * config.top_k)
    per_token += 4 * 2 * width + 2 * max(config.hidden_size, width)
    if config.num_draft_layers:  # hidden states that wait, and what they are joined to
        per_token += 4 * 6 * config.hidden_size
    return chunk * per_token + 4 * config.vocab_size


def plan_memory(
    *,
    limit: int,
    expert_ram: int | None,
    process: int,
    dense: int,
    kv: int,
    workspace: int,
    experts: int,
    floor: int,
    mappable: bool,
) -> MemoryPlan:
    """Share `limit` out. `floor` is what one layer's top_k experts take; less cannot work.

    Raises MemoryError with the number that would work.
    """
    fixed = process + dense + kv + workspace
    slots = min(experts, max(0, limit - fixed) if expert_ram is None else expert_ram)
    if slots < floor:
        if expert_ram is not None:
            raise MemoryError(
                f"an expert budget of {format_bytes(expert_ram)} is too small: one layer's experts "
                f"take {format_bytes(floor)}; give --expert-ram at least that"
            )
        raise MemoryError(
            f"{format_bytes(limit)} of memory is too little: dense weights take "
            f"{format_bytes(dense)}, the KV cache {format_bytes(kv)}, workspace "
            f"{format_bytes(workspace)}, the process itself {format_bytes(process)}, and one "
            f"layer's experts {format_bytes(floor)}; give --ram at least "
            f"{format_bytes(fixed + floor)}, or a smaller --context"
        )
    return MemoryPlan(
        limit, process, dense, kv, workspace, experts, slots, mapped=mappable and slots >= experts
    )
