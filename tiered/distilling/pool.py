"""A layer's experts in torch, to be trained: a pool with a router, or one dense feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import ModelConfig

Floats = Any  # a torch.Tensor of float32


class Pool(NamedTuple):
    """Weights of a layer's experts; a dense feed-forward is one expert without a router."""

    gate: Floats  # [num_experts, size, hidden_size]
    up: Floats  # [num_experts, size, hidden_size]
    down: Floats  # [num_experts, hidden_size, size]
    router: Floats | None = None  # [num_experts, hidden_size]
    correction: Floats | None = None  # [num_experts]: added to choose experts by; not trained

    def take(self, experts: Sequence[int]) -> Pool:
        """Some of the experts, and their rows of the router."""
        index = list(experts)
        return Pool(*(None if part is None else part[index].clone() for part in self))

    def to(self, device: torch.device | str) -> Pool:
        return Pool(*(None if part is None else part.to(device) for part in self))

    def clone(self) -> Pool:
        return Pool(*(None if part is None else part.detach().clone() for part in self))

    def rounded(self, kind: torch.dtype) -> Pool:
        """As it will be stored."""
        with torch.no_grad():
            return Pool(*(None if part is None else part.to(kind).float() for part in self))

    @property
    def trained(self) -> list[Floats]:
        return [part for part in self[:4] if part is not None]


def load_pool(checkpoint: Checkpoint, layer: int) -> Pool:
    """The teacher's."""
    prefix, config = f"layers.{layer}.", checkpoint.config

    def matrices(name: str) -> Floats:
        names = [f"{prefix}experts.{expert}.{name}" for expert in range(config.num_experts)]
        return torch.from_numpy(np.stack([checkpoint.float32(each) for each in names]))

    def floats(name: str) -> Floats:
        return torch.from_numpy(np.array(checkpoint.float32(prefix + name), np.float32))

    corrected = f"{prefix}router_correction" in checkpoint.tensors
    return Pool(
        matrices("gate"),
        matrices("up"),
        matrices("down"),
        floats("router"),
        floats("router_correction") if corrected else None,
    )


def feed_forward(h: Floats, gate: Floats, up: Floats, down: Floats) -> Floats:
    """[num_tokens, hidden_size] -> the same."""
    return (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T


def route(h: Floats, pool: Pool, config: ModelConfig) -> tuple[torch.Tensor, Floats]:
    """Experts (int64) and weights, [num_tokens, top_k] each: what cpu_kernels.route computes."""
    assert pool.router is not None
    logits = h @ pool.router.T
    scores = torch.softmax(logits, 1) if config.router_scoring == "softmax" else logits.sigmoid()
    choices = scores if pool.correction is None else scores + pool.correction
    experts = choices.topk(config.top_k, dim=1).indices
    weights = scores.gather(1, experts)
    if config.normalize_top_k:
        weights = weights / weights.sum(1, keepdim=True)
    return experts, weights * config.routing_scale


def run_pool(h: Floats, pool: Pool, config: ModelConfig) -> Floats:
    """What the experts say together: [num_tokens, hidden_size]."""
    if pool.router is None:
        return feed_forward(h, pool.gate[0], pool.up[0], pool.down[0])
    experts, weights = route(h, pool, config)
    out = torch.zeros_like(h)
    for expert in range(len(pool.gate)):
        tokens, ranks = (experts == expert).nonzero(as_tuple=True)
        said = feed_forward(h[tokens], pool.gate[expert], pool.up[expert], pool.down[expert])
        out = out.index_add(0, tokens, weights[tokens, ranks, None] * said)
    return out


def dense_weights(h: Floats, pool: Pool, config: ModelConfig) -> Floats:
    """Routing weights, 0 for the experts that were not chosen: [num_tokens, num_experts]."""
    experts, weights = route(h, pool, config)
    return torch.zeros(len(h), len(pool.gate)).scatter(1, experts, weights)


def load_shared(checkpoint: Checkpoint, layer: int) -> Any:
    """The expert that every token uses: (gate, up, down, scale or None), or None without one."""
    prefix = f"layers.{layer}.shared."
    if prefix + "gate" not in checkpoint.tensors:
        return None
    names = [prefix + name for name in ("gate", "up", "down", "scale")]
    return tuple(
        torch.from_numpy(np.array(checkpoint.float32(name), np.float32))
        if name in checkpoint.tensors
        else None
        for name in names
    )
