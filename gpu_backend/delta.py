"""Gated DeltaNet: a layer that remembers a text in a matrix per head.

https://arxiv.org/abs/2412.06464, as in cpu_kernels.delta.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.gating import silu
from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm
from gpu_backend.recurrent import CHUNK, convolve, decays_of, runs_of, write_and_read

NORM_EPS = 1e-6  # of queries and keys


class DeltaLayer:
    """`weights` has the attributes of tiered.backend.DeltaWeights; `number` counts such layers."""

    def __init__(self, weights: Any, config: Any, number: int, device: torch.device) -> None:
        d, w = config.delta, weights
        self._delta, self._eps, self._number = d, float(config.norm_eps), number
        self._qkv, self._z, self._b, self._a, self._o = (
            matrix.load() for matrix in (w.qkv, w.z, w.b, w.a, w.o)
        )
        self._norm, self._conv, self._dt_bias, self._decay, self._head_norm = (
            torch.tensor(array, device=device)
            for array in (w.norm, w.conv, w.dt_bias, w.decay, w.head_norm)
        )
        heads = torch.arange(d.num_value_heads, device=device)
        shared = d.num_value_heads // d.num_key_heads
        self._key_heads = heads % d.num_key_heads if d.is_tiled else heads // shared

    def run(self, x: torch.Tensor, batch: Any, arithmetic: Any) -> None:
        """x += delta_net(norm(x)); each text's state goes on by its tokens."""
        d, shape = self._delta, (len(x), self._delta.num_value_heads, self._delta.value_dim)
        rows = Rows(rms_norm(x, self._norm, self._eps), arithmetic)
        qkv, b, a = (matrix.multiply(rows) for matrix in (self._qkv, self._b, self._a))
        step = torch.nn.functional.softplus((a + self._dt_bias).double(), threshold=30)
        logs, betas = self._decay.double() * step, torch.sigmoid(b)
        values = torch.empty(shape, device=x.device)
        for run in runs_of(batch):
            memory = run.of_layer(self._number)
            size = (d.conv_size - 1) * d.channels
            history = memory[:size].view(-1, d.channels)
            state = memory[size:].view(d.num_value_heads, d.key_dim, d.value_dim)
            mixed = convolve(qkv[run.rows], history, self._conv, activated=True)
            parts = self._heads(mixed)
            values[run.rows] = scan(state, *parts, logs[run.rows], betas[run.rows])
        values = rms_norm(values, self._head_norm, self._eps).flatten(1)
        x += self._o.multiply(Rows(silu(self._z.multiply(rows)) * values, arithmetic))

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit queries (over the root of their size) and keys, and values, of the heads of values:
        float32 [num_tokens, num_value_heads, size]."""
        d = self._delta
        width = d.num_key_heads * d.key_dim
        q, k, v = mixed.split([width, width, d.num_value_heads * d.value_dim], -1)
        q, k = (t.unflatten(-1, (d.num_key_heads, d.key_dim)) for t in (q, k))
        q, k = (t / torch.sqrt(t.square().sum(-1, keepdim=True) + NORM_EPS) for t in (q, k))
        q = q * d.key_dim**-0.5
        q, k = (t[:, self._key_heads] for t in (q, k))
        return q, k, v.unflatten(-1, (d.num_value_heads, d.value_dim))


def scan(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logs: torch.Tensor,
    betas: torch.Tensor,
) -> torch.Tensor:
    """What each token reads: float32 [num_tokens, heads, value_dim]; `state` [heads, key_dim,
    value_dim] goes on. S = decay * S;   S += k (v - k S) * beta;   out = q S.

    q, k, v: [num_tokens, heads, size]; logs (of the decays, float64) and betas: [num_tokens,
    heads].
    """
    if len(q) == 1:
        return _step(state, q[0], k[0], v[0], torch.exp(logs[0]).float(), betas[0])[None]
    parts = zip(*(t.split(CHUNK) for t in (q, k, v, logs, betas)), strict=True)
    return torch.cat([_chunk(state, *part) for part in parts])


def _step(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """One token. It reads the old state once: q S = decay * q S_before + (q k) * what is
    written."""
    both = torch.bmm(torch.stack([k, q], 1), state)  # [heads, 2, value_dim]
    seen, asked = (decay[:, None, None] * both).unbind(1)
    delta = (v - seen) * beta[:, None]
    state.mul_(decay[:, None, None]).addcmul_(k[..., None], delta[:, None])
    return asked + (q * k).sum(-1, keepdim=True) * delta


def _chunk(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logs: torch.Tensor,
    betas: torch.Tensor,
) -> torch.Tensor:
    """Several tokens at once. What each writes is less what those before it have written at its
    key: a triangular system. https://arxiv.org/abs/2412.06464, section 3.3."""
    q, k, v, logs, betas = (t.transpose(0, 1).contiguous() for t in (q, k, v, logs, betas))
    decays, betas = decays_of(logs), betas[..., None]
    wanted = betas * (v - decays.start * torch.bmm(k, state))
    overlap = betas * torch.bmm(k, k.transpose(1, 2)) * decays.between
    written = torch.linalg.solve_triangular(overlap, wanted, upper=False, unitriangular=True)
    return write_and_read(state, q, k, written, decays).transpose(0, 1)
