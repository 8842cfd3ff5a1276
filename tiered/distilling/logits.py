"""Training by logits: all students of a model together, to say what the teacher says next.

The loss is the divergence KL(teacher || student) of the next token's distribution; the teacher's
are computed once and kept on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tiered.config import ModelConfig
from tiered.distilling.decoder import Decoder
from tiered.distilling.pool import Floats, Pool
from tiered.distilling.training import rate
from tiered.engine import Engine
from tiered.text.sampling import log_softmax

LENGTH = 256  # tokens of a text that is trained on at once
HELD_OUT = 8  # every so many-th text is held out ...
MOST_HELD_OUT = 8  # ... but no more than this
EVALUATIONS = 8  # in a run; what was done until then is kept
TEACHER = "teacher.npy"
STATE = "state.pt"
CLIP = 1.0  # largest length of a gradient

Progress = Callable[[int, int], None]


class Texts(NamedTuple):
    """Starts of the texts, tokens of LENGTH each (or of all there are, if fewer)."""

    length: int
    training: list[int]  # in the order that steps take them
    apart: list[int]

    @property
    def all(self) -> list[int]:
        return self.training + self.apart


def choose_texts(num_tokens: int, context: int, steps: int, seed: int) -> Texts:
    """What of a text is trained on, and what is held out. ValueError if it is too short."""
    length = min(LENGTH, context)
    starts = list(range(0, num_tokens - length + 1, length))
    apart = starts[HELD_OUT - 1 :: HELD_OUT][:MOST_HELD_OUT]
    if not apart:
        raise ValueError(
            f"the text has {num_tokens} tokens, and --logits-steps needs at least "
            f"{HELD_OUT * length}: give a longer --text"
        )
    others = [start for n, start in enumerate(starts) if n % HELD_OUT != HELD_OUT - 1]
    order = np.random.default_rng(seed).permutation(len(others))
    return Texts(length, [others[n] for n in order[:steps]], apart)


def logits_bytes(texts: Texts, vocab_size: int) -> int:
    return 2 * len(texts.all) * texts.length * vocab_size


def listen(
    engine: Engine, ids: Sequence[int], texts: Texts, folder: Path, progress: Progress
) -> None:
    """Write the teacher's log-probabilities: float16 [num_texts, length, vocab_size]."""
    partial = folder / f"partial-{TEACHER}"
    shape = len(texts.all), texts.length, engine.config.vocab_size
    rows = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    for number, start in enumerate(texts.all):
        progress(number, len(texts.all))
        said = log_softmax(engine.logits(ids[start : start + texts.length]))
        rows[number] = np.maximum(said, np.finfo(np.float16).min)
    rows.flush()
    os.replace(partial, folder / TEACHER)
    progress(len(texts.all), len(texts.all))


class Said(NamedTuple):
    pools: dict[int, Pool]  # the best, as they would be stored
    before: float  # divergence on what was held out, nats
    after: float
    evaluations: list[tuple[int, float]]  # steps, divergence


class LogitsTraining:
    """Trains `pools` (by layer) in place. `kinds` says how each layer's are stored."""

    def __init__(
        self,
        decoder: Decoder,
        config: ModelConfig,
        pools: Mapping[int, Pool],
        kinds: Mapping[int, torch.dtype],
        ids: Sequence[int],
        texts: Texts,
        folder: Path,
        device: str,
    ) -> None:
        self.decoder, self.config, self.kinds = decoder, config, kinds
        self.texts, self.folder, self.device = texts, folder, device
        self.tokens = torch.tensor(ids, device=device)
        self.teacher = np.load(folder / TEACHER, mmap_mode="r")
        self.pools = {layer: pool.clone().to(device) for layer, pool in pools.items()}
        self.trained = [part for pool in self.pools.values() for part in pool.trained]
        for part in self.trained:
            part.requires_grad_(True)
        self.best = {layer: pool.clone() for layer, pool in self.pools.items()}
        self.evaluations: list[tuple[int, float]] = []

    def divergence(self, number: int, pools: Mapping[int, Pool]) -> Floats:
        """Mean over the tokens of one text, nats."""
        start = self.texts.all[number]
        tokens = self.tokens[start : start + self.texts.length]
        said = torch.log_softmax(self.decoder.logits(tokens, pools, self.config), 1)
        wanted = torch.from_numpy(self.teacher[number].astype(np.float32)).to(self.device)
        return (wanted.exp() * (wanted - said)).sum(1).mean()

    def evaluate(self) -> tuple[float, dict[int, Pool]]:
        """Of the students as they would be stored, on what is held out; and those."""
        stored = {layer: pool.rounded(self.kinds[layer]) for layer, pool in self.pools.items()}
        first = len(self.texts.training)
        with torch.no_grad():
            found = [float(self.divergence(n, stored)) for n in range(first, len(self.texts.all))]
        return sum(found) / len(found), stored

    def run(self, steps: int, learning_rate: float, progress: Progress) -> Said:
        optimizer = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=0.0, fused=True)
        every = max(1, -(-steps // EVALUATIONS))
        step = self._restore(optimizer)
        if not self.evaluations:
            self._keep(0, optimizer)
        while step < steps:
            progress(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate(step, steps)
            loss = self.divergence(step % len(self.texts.training), self.pools)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            optimizer.step()
            step += 1
            if step % every == 0 or step == steps:
                self._keep(step, optimizer)
        progress(steps, steps)
        found = [divergence for _, divergence in self.evaluations]
        return Said(self.best, found[0], min(found), self.evaluations)

    def _keep(self, step: int, optimizer: Any) -> None:
        """Evaluate, and write down all that going on from here takes."""
        divergence, stored = self.evaluate()
        if all(divergence < before for _, before in self.evaluations):
            self.best = {layer: pool.clone().to("cpu") for layer, pool in stored.items()}
        self.evaluations.append((step, divergence))
        state = {
            "step": step,
            "trained": [part.detach() for part in self.trained],
            "best": [part for pool in self.best.values() for part in pool.trained],
            "optimizer": optimizer.state_dict(),
            "evaluations": self.evaluations,
        }
        partial = self.folder / f"partial-{STATE}"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE)

    def _restore(self, optimizer: Any) -> int:
        """How many steps were done before."""
        if not (self.folder / STATE).exists():
            return 0
        state = torch.load(self.folder / STATE, weights_only=True, map_location=self.device)
        with torch.no_grad():
            for part, values in zip(self.trained, state["trained"], strict=True):
                part.copy_(values)
        self.best = {layer: pool.clone().to("cpu") for layer, pool in self.pools.items()}
        parts = [part for pool in self.best.values() for part in pool.trained]
        for part, values in zip(parts, state["best"], strict=True):
            part.copy_(values)
        optimizer.load_state_dict(state["optimizer"])
        self.evaluations = [(int(at), float(value)) for at, value in state["evaluations"]]
        return int(state["step"])
