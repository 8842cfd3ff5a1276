"""Training one layer's student: the mean squared error of its output, with AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from tiered.config import ModelConfig
from tiered.distilling.pool import Floats, Pool, run_pool
from tiered.distilling.samples import Samples, held_out

ROWS = 2048  # tokens that are evaluated at once
WARMUP = 0.05  # of the steps
PATIENCE = 2  # epochs without a better held-out error, after which training ends


class Recipe(NamedTuple):
    """How to train."""

    epochs: int
    batch: int  # tokens
    learning_rate: float
    seed: int
    device: str = "cpu"
    logits_steps: int = 0  # after that, of all layers together
    logits_learning_rate: float = 1e-4


class Epoch(NamedTuple):
    train: float  # error, mean over the epoch
    held_out: float  # error after it


class Trained(NamedTuple):
    pool: Pool
    beginning: str
    beginnings: dict[str, float]  # held-out error of each
    epochs: list[Epoch]
    error: float  # of `pool` on what was held out


class Part(NamedTuple):
    """Samples in torch. An error of 1 is that of saying nothing."""

    inputs: Floats
    outputs: Floats
    weights: Floats  # [num_tokens]: what squared errors count

    def batch(self, rows: torch.Tensor) -> Part:
        return Part(self.inputs[rows], self.outputs[rows], self.weights[rows])


def split(samples: Samples, device: str) -> tuple[Part, Part]:
    """What is trained on, and what is held out."""
    apart = held_out(len(samples.inputs))
    return _part(samples.take(~apart), device), _part(samples.take(apart), device)


def _part(samples: Samples, device: str) -> Part:
    weights = 1 / np.maximum(samples.energy, np.finfo(np.float32).tiny)
    silent = np.square(samples.outputs).sum(axis=1) @ weights
    weights *= len(weights) / max(float(silent), 1e-30)
    return Part(*(torch.from_numpy(a).to(device) for a in (*samples[:2], weights)))


def error_of(part: Part, pool: Pool, config: ModelConfig) -> Floats:
    """Weighted squared error, mean over the tokens."""
    missed = run_pool(part.inputs, pool, config) - part.outputs
    return (missed.square().sum(1) * part.weights).mean()


def evaluate(part: Part, pool: Pool, config: ModelConfig) -> float:
    total, rows = 0.0, torch.arange(len(part.inputs))
    with torch.no_grad():
        for some in rows.split(ROWS):
            total += float(error_of(part.batch(some), pool, config)) * len(some)
    return total / len(rows)


def begin(
    beginnings: Iterator[tuple[str, Pool]], part: Part, config: ModelConfig, kind: torch.dtype
) -> tuple[Pool, str, dict[str, float]]:
    """The best beginning, as it would be stored, its name, and the errors of all."""
    errors: dict[str, float] = {}
    best: Pool | None = None
    for name, pool in beginnings:
        pool = pool.rounded(kind)
        errors[name] = evaluate(part, pool.to(part.inputs.device), config)
        if best is None or errors[name] == min(errors.values()):
            best, chosen = pool, name
    assert best is not None
    return best, chosen, errors


def train(
    beginnings: Iterator[tuple[str, Pool]],
    parts: tuple[Part, Part],
    config: ModelConfig,
    recipe: Recipe,
    kind: torch.dtype,
    progress: Callable[[int], None],
) -> Trained:
    """The best beginning, trained; never worse on the held-out part, as stored in `kind`."""
    training, apart = parts
    best, name, errors = begin(beginnings, apart, config, kind)
    error = errors[name]
    pool = best.clone().to(recipe.device)
    for weights in pool.trained:
        weights.requires_grad_(True)
    steps = recipe.epochs * math.ceil(len(training.inputs) / recipe.batch)
    optimizer = torch.optim.AdamW(
        pool.trained, lr=recipe.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    random = torch.Generator().manual_seed(recipe.seed)
    epochs: list[Epoch] = []
    worse = 0
    for _ in range(recipe.epochs):
        sums = 0.0
        for rows in torch.randperm(len(training.inputs), generator=random).split(recipe.batch):
            loss = error_of(training.batch(rows), pool, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pool.trained, 1.0)
            optimizer.step()
            schedule.step()
            sums += float(loss.detach()) * len(rows)
        stored = pool.rounded(kind)
        epochs.append(Epoch(sums / len(training.inputs), evaluate(apart, stored, config)))
        progress(len(epochs))
        if epochs[-1].held_out < error:
            best, error, worse = stored.clone().to("cpu"), epochs[-1].held_out, 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    return Trained(best, name, errors, epochs, error)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up in a few steps, then down as a cosine does."""
    warm = max(WARMUP * steps, 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
