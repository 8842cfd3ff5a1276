"""Softmax attention of rows over what they may see, by torch's own kernels."""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

SCORES = 1 << 25  # that are computed at once, at most, where torch keeps them all


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q: float32 [num_rows, num_heads, head_dim], scaled; keys and values: [length, num_kv_heads,
    size]; mask: bool [num_rows, length]; sinks: float32 [num_heads], a score for each head that
    takes attention and gives nothing. Returns [num_rows, num_heads, size of values].

    Heads that share keys are rows of one head here, so that nothing is repeated.
    """
    num_rows, num_heads, _ = q.shape
    if sinks is not None:  # one more position, whose key and value are zero
        keys, values = (pad(t, (0, 0, 0, 0, 0, 1)) for t in (keys, values))
        mask = None if mask is None else pad(mask, (0, 1), value=True)
    length, num_kv_heads, _ = keys.shape
    group = num_heads // num_kv_heads
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # [kv_heads, length, size]
    step, parts = max(1, SCORES // (num_heads * length)), []
    for first in range(0, num_rows, step):
        part = q[first : first + step]
        part = part.unflatten(1, (num_kv_heads, group)).transpose(0, 1)  # [kv_heads, n, group, .]
        seen = None if mask is None else mask[first : first + step]
        out = scaled_dot_product_attention(
            part.flatten(1, 2)[None],
            keys[None],
            values[None],
            attn_mask=_for_groups(seen, sinks, part.shape[:3], length),
            scale=1.0,
        )[0]
        parts.append(out.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2))
    return torch.cat(parts)


def _for_groups(
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    shape: tuple[int, int, int],
    length: int,
) -> torch.Tensor | None:
    """The mask of [num_kv_heads, num_rows * group, length] scores; floats are added to them."""
    num_kv_heads, num_rows, group = shape
    if mask is not None:
        mask = mask[:, None].expand(-1, group, -1).flatten(0, 1)
    if sinks is None:
        return mask
    added = torch.zeros((num_kv_heads, num_rows, group, length), device=sinks.device)
    added[..., -1] = sinks.reshape(num_kv_heads, 1, group)
    added = added.flatten(1, 2)
    return added if mask is None else added.masked_fill(~mask, float("-inf"))
