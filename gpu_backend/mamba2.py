"""Mamba-2: a layer that remembers a text in a matrix per head.

https://arxiv.org/abs/2405.21060, as in cpu_kernels.mamba2.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_backend.gating import silu
from gpu_backend.matrix import Rows
from gpu_backend.norm import rms_norm
from gpu_backend.recurrent import CHUNK, convolve, decays_of, runs_of, write_and_read


class Mamba2Layer:
    """`weights` has the attributes of tiered.backend.Mamba2Weights; `number` counts such layers."""

    def __init__(self, weights: Any, config: Any, number: int, device: torch.device) -> None:
        w = weights
        self._mamba2, self._eps, self._number = config.mamba2, float(config.norm_eps), number
        self._z, self._xbc, self._dt, self._o = (
            matrix.load() for matrix in (w.z, w.xbc, w.dt, w.o)
        )
        self._norm, self._conv, self._conv_bias, self._dt_bias, self._decay, self._skip, norm = (
            None if array is None else torch.tensor(array, device=device)
            for array in (w.norm, w.conv, w.conv_bias, w.dt_bias, w.decay, w.skip, w.out_norm)
        )
        self._out_norm = norm.view(config.mamba2.num_groups, -1)

    def run(self, x: torch.Tensor, batch: Any, arithmetic: Any) -> None:
        """x += mamba2(norm(x)); each text's state goes on by its tokens."""
        m, eps = self._mamba2, self._eps
        rows = Rows(rms_norm(x, self._norm, eps), arithmetic)
        xbc, dt = self._xbc.multiply(rows), self._dt.multiply(rows)
        steps = torch.nn.functional.softplus((dt + self._dt_bias).double(), threshold=30)
        logs, steps = self._decay.double() * steps, steps.float()
        values = torch.empty((len(x), m.num_heads, m.head_dim), device=x.device)
        for run in runs_of(batch):
            memory = run.of_layer(self._number)
            size = (m.conv_size - 1) * m.channels
            history = memory[:size].view(-1, m.channels)
            state = memory[size:].view(m.num_heads, m.state_dim, m.head_dim)
            mixed = convolve(xbc[run.rows], history, self._conv, self._conv_bias, activated=True)
            v, k, q = self._heads(mixed)
            read = scan(state, q, k, v, logs[run.rows], steps[run.rows])
            values[run.rows] = read + self._skip[:, None] * v
        gated = silu(self._z.multiply(rows)) * values.flatten(1)
        groups = gated.unflatten(-1, (m.num_groups, -1))
        normed = rms_norm(groups, self._out_norm, m.norm_eps).flatten(1)
        x += self._o.multiply(Rows(normed, arithmetic))

    def _heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, keys and queries of all heads: float32 [num_tokens, num_heads, size]."""
        m = self._mamba2
        width = m.num_groups * m.state_dim
        v, k, q = mixed.split([m.inner_size, width, width], -1)
        k, q = (
            t.unflatten(-1, (m.num_groups, m.state_dim)).repeat_interleave(
                m.num_heads // m.num_groups, 1
            )
            for t in (k, q)
        )
        return v.unflatten(-1, (m.num_heads, m.head_dim)), k, q


def scan(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    logs: torch.Tensor,
    steps: torch.Tensor,
) -> torch.Tensor:
    """What each token reads: float32 [num_tokens, heads, head_dim]; `state` [heads, state_dim,
    head_dim] goes on. S = decay * S + k (step * v);   out = q S.

    q, k, v: [num_tokens, heads, size]; logs (of the decays, float64) and steps: [num_tokens,
    heads].
    """
    written = steps[..., None] * v
    if len(q) == 1:
        state.mul_(torch.exp(logs[0]).float()[:, None, None])
        state.addcmul_(k[0][..., None], written[0][:, None])
        return torch.bmm(q[0][:, None], state).transpose(0, 1)
    parts = zip(*(t.split(CHUNK) for t in (q, k, written, logs)), strict=True)
    return torch.cat([_chunk(state, *part) for part in parts])


def _chunk(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    written: torch.Tensor,
    logs: torch.Tensor,
) -> torch.Tensor:
    q, k, written, logs = (t.transpose(0, 1).contiguous() for t in (q, k, written, logs))
    return write_and_read(state, q, k, written, decays_of(logs)).transpose(0, 1)
