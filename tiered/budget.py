"""How the memory of one process is shared out: what is fixed, and what is left for expert slots."""

from __future__ import annotations

from dataclasses import dataclass

from tiered.config import ModelConfig
from tiered.memory import format_bytes

LONGEST_PASS = 4096  # tokens: between two passes, others have their turn
PASS_SHARE = 1 / 32  # of the expert slots, that a longer pass is worth


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
    pass_tokens: int  # of a prompt, computed layer by layer: see tiered.chunks

    @property
    def fixed(self) -> int:
        return self.process + self.dense + self.kv + self.workspace


def workspace_bytes(config: ModelConfig, chunk: int) -> int:
    """Scratch for `chunk` tokens at once: hidden states, projections, pair outputs, logits."""
    shapes = config.own_shape, config.full_shape or config.own_shape
    heads = max((config.num_heads + 2 * s.num_kv_heads) * s.head_dim for s in shapes)
    width = max(config.ffn_size, config.shared_expert_size, config.expert_size * config.top_k)
    per_token = 4 * (4 * config.hidden_size + 2 * heads + config.hidden_size * config.top_k)
    per_token += 4 * 2 * width + 4 * max(config.hidden_size, width)
    if config.num_draft_layers:  # hidden states that wait, and what they are joined to
        per_token += 4 * 6 * config.hidden_size
    return chunk * per_token + 4 * config.vocab_size


def pass_bytes(config: ModelConfig) -> int:
    """What each token takes that a pass has more than one chunk: hidden states, also after the
    norm and with what dense branches say, and pair outputs."""
    rows = 4 + config.top_k * (2 if config.weighted_inputs else 1)
    return 4 * config.hidden_size * rows


def pass_tokens(chunk: int, longest: int, nbytes: int, per_token: int) -> int:
    """Tokens of a pass: as many chunks as there are `nbytes` for, besides the first, and at most
    `longest` tokens (but for one chunk)."""
    more = min(longest - chunk, nbytes // per_token)
    return chunk + max(0, more) // chunk * chunk


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
    chunk: int,
    longest_pass: int,
    pass_bytes: int,
) -> MemoryPlan:
    """Share `limit` out. `floor` is what one layer's top_k experts take; less cannot work.
    `workspace` is for `chunk` tokens. Passes are longer, by tokens of `pass_bytes` each, where
    there is memory to spare, or for a small part of the slots.

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
    mapped = mappable and slots >= experts
    spare = max(0, limit - fixed - slots)
    given = 0 if mapped else min(int(slots * PASS_SHARE), slots - floor)
    longest_pass = longest_pass if experts else chunk  # nothing to share
    tokens = pass_tokens(chunk, longest_pass, spare + given, pass_bytes)
    longer = (tokens - chunk) * pass_bytes
    return MemoryPlan(
        limit, process, dense, kv, workspace + longer, experts, slots - max(0, longer - spare),
        mapped, tokens,
    )  # fmt: skip
