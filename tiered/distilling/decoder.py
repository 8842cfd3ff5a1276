"""A whole model in torch, whose experts are students: what it says can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import LatentConfig, ModelConfig
from tiered.distilling.pool import Floats, Pool, feed_forward, load_shared, run_pool

# What attention may have that this one does not: ModelConfig's field, what it must be.
PLAIN: Mapping[str, Any] = {
    "latent": LatentConfig(),
    "recurrent_layers": frozenset(),
    "gated_attention": False,
    "value_norm": False,
    "layer_norms": False,
    "norm_offset": 0.0,
    "full_shape": None,
    "full_layers_rotate": True,
    "chunked_attention": False,
    "temperature_step": 0,
    "attention_sinks": False,
    "logit_softcap": 0.0,
}


def check_decoder(config: ModelConfig) -> None:
    """ValueError names what of a model this file does not compute."""
    odd = [name for name, value in PLAIN.items() if getattr(config, name) != value]
    if config.rope.pairs != "half":
        odd.append("rope pairs")
    if config.qk_norm not in ("", "head", "full"):
        odd.append("qk_norm")
    if odd:
        raise ValueError(
            f"{config.model_type} cannot be trained by its logits: training does not know its "
            f"{' and '.join(name.replace('_', ' ') for name in odd)}; leave --logits-steps out"
        )


class Decoder:
    """Everything but the experts, from the teacher's checkpoint, float32; nothing of it is
    trained. With `is_dense` the students stand for the shared experts, too."""

    def __init__(self, checkpoint: Checkpoint, is_dense: bool, device: str = "cpu") -> None:
        self.config = checkpoint.config
        self._device = device
        self._weights = {
            name: self._load(checkpoint, name)
            for name in checkpoint.tensors
            if ".experts." not in name and ".router" not in name
        }
        self._shared = {
            layer: load_shared(checkpoint, layer)
            for layer in self.config.sparse_layers
            if not is_dense
        }

    def _load(self, checkpoint: Checkpoint, name: str) -> Floats:
        values = np.ascontiguousarray(checkpoint.float32(name), np.float32)
        return torch.from_numpy(values).to(self._device)

    def logits(
        self, tokens: torch.Tensor, pools: Mapping[int, Pool], config: ModelConfig
    ) -> Floats:
        """What follows each token of a text: [num_tokens, vocab_size]. `pools` by layer, and the
        config that they are of."""
        c, w = self.config, self._weights
        x = w["embed"][tokens] * c.embedding_scale  # [num_tokens, hidden_size]
        for layer in range(c.num_layers):
            x = x + self._attention(self._norm(x, f"layers.{layer}.attention_norm"), layer)
            h = self._norm(x, f"layers.{layer}.ffn_norm")
            x = x + self._feed_forward(h, layer, pools, config)
        head = w["head"] if "head" in w else w["embed"]
        return (self._norm(x, "norm") * c.logit_scale) @ head.T

    def _feed_forward(
        self, h: Floats, layer: int, pools: Mapping[int, Pool], config: ModelConfig
    ) -> Floats:
        if layer not in pools:
            parts = (self._weights[f"layers.{layer}.ffn.{name}"] for name in ("gate", "up", "down"))
            return feed_forward(h, *parts)
        out = run_pool(h, pools[layer], config)
        shared = self._shared.get(layer)
        if shared is None:
            return out
        gate, up, down, scale = (None if w is None else w.to(self._device) for w in shared)
        always = feed_forward(h, gate, up, down)
        return out + (always if scale is None else always * (h @ scale.T).sigmoid())

    def _norm(self, x: Floats, name: str) -> Floats:
        return self._weights[name] * rms(x, self.config.norm_eps)

    def _projected(self, h: Floats, layer: int, name: str) -> Floats:
        w, full = self._weights, f"layers.{layer}.{name}"
        return functional.linear(h, w[full], w.get(f"{full}_bias"))

    def _attention(self, h: Floats, layer: int) -> Floats:
        c, length = self.config, len(h)
        q, k, v = (self._projected(h, layer, name) for name in "qkv")
        if c.qk_norm == "full":
            q, k = self._norm(q, f"layers.{layer}.q_norm"), self._norm(k, f"layers.{layer}.k_norm")
        if c.clip_qkv:
            q, k, v = (part.clamp(-c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        # [heads, num_tokens, head_dim]
        q, k, v = (part.reshape(length, -1, c.head_dim).swapaxes(0, 1) for part in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm(q, f"layers.{layer}.q_norm"), self._norm(k, f"layers.{layer}.k_norm")
        cos, sin = self._rotation(length)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat_interleave(c.num_heads // c.num_kv_heads, dim=0) for part in (k, v))
        out = functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=self._mask(length, layer),
            scale=c.query_scale or c.head_dim**-0.5,
        )[0]  # fmt: skip
        return self._projected(out.swapaxes(0, 1).reshape(length, -1), layer, "o")

    def _mask(self, length: int, layer: int) -> torch.Tensor:
        """Which positions see which: bool [num_tokens, num_tokens]."""
        at = torch.arange(length, device=self._device)
        back = at[:, None] - at
        window = self.config.window(layer) or length
        return (back >= 0) & (back < window)

    def _rotation(self, length: int) -> tuple[Floats, Floats]:
        """cos and sin of every position's angles, [num_tokens, dim / 2] each."""
        rope = self.config.rope
        dim = rope.dim or self.config.head_dim
        frequency = float(rope.theta) ** (-np.arange(0, dim, 2) / dim)
        if rope.inv_freq_scale:
            frequency = frequency / np.asarray(rope.inv_freq_scale)
        angles = np.arange(length)[:, None] * frequency
        cos, sin = (
            torch.from_numpy((part * rope.magnitude).astype(np.float32)).to(self._device)
            for part in (np.cos(angles), np.sin(angles))
        )
        return cos, sin


def rms(x: Floats, eps: float) -> Floats:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """[heads, num_tokens, head_dim], whose first values rotate by position, halves together."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
