"""Pareto: speed and quality of a model's settings, and which of them no other beats in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tiered.checkpoints.checkpoint import Checkpoint
from tiered.engine import Engine
from tiered.measuring.bench import measure_speed
from tiered.quality.compare import compare_text
from tiered.quality.saved import SavedSide
from tiered.quality.side import LiveSide
from tiered.store import ExpertStore
from tiered.whole_blocks import WholeBlocks


@dataclass(frozen=True)
class Point:
    """One setting of one model under one budget. What it says does not depend on the budget."""

    model: str  # as it was given
    version: str  # of its files, and of the table
    experts: int  # per layer
    pruned: str  # how they became so many; empty: the file has them
    quantize: str
    top_k: int  # 0: the model's own
    layer_k: str  # a table; empty: none
    top_p: float
    min_weight: float
    expert_ram: int  # bytes; 0: what they need

    @property
    def setting(self) -> Point:
        """The same for all budgets."""
        return replace(self, expert_ram=0)

    @property
    def choices(self) -> dict[str, Any]:
        """EngineConfig's."""
        return {
            "quantize": self.quantize,
            "expert_top_k": self.top_k or None,
            "expert_layer_k": self.layer_k or None,
            "expert_top_p": self.top_p,
            "expert_min_weight": self.min_weight,
            "expert_ram": self.expert_ram or None,
        }


QUALITY = (
    "perplexity", "ratio", "ratio_low", "ratio_high", "kl", "kl_low", "kl_high", "kl_99",
    "same_token", "experts_per_token", "expert_bytes",
)  # fmt: skip
SPEED = "decode_tok_s", "prefill_tok_s", "hit_rate", "read_mb_per_token"
POINT = tuple(field.name for field in fields(Point))
COLUMNS = ("setup", *POINT, *QUALITY, *SPEED, "problem")
NUM_KEYS = 1 + len(POINT)


def key(setup: str, point: Point) -> dict[str, Any]:
    """What identifies a row; `setup` stands for the text and all that is common to the points."""
    return {"setup": setup, **asdict(point)}


def failed(problem: str) -> dict[str, Any]:
    return dict.fromkeys((*QUALITY, *SPEED), "") | {"problem": problem}


class Lab:
    """Measures points; what budgets do not change is measured once.

    Quality is how far what a setting says of a text is from what the reference said; speed is that
    of reading `prompt` and writing `answer`, the median of some runs. `choices` are EngineConfig's.
    """

    def __init__(
        self,
        reference: SavedSide,
        prompt: Sequence[int],
        answer: Sequence[int],
        runs: int,
        choices: Mapping[str, Any],
    ) -> None:
        self.reference = reference
        self.prompt, self.answer, self.runs = prompt, answer, runs
        self.choices = choices

    def measure(
        self,
        path: Path,
        point: Point,
        known: Sequence[Mapping[str, Any]] = (),
        progress: Callable[[int], None] = lambda rows: None,
    ) -> dict[str, Any]:
        """The results of a point, whose model is at `path`; `problem` says why there are none.

        `known` are rows of the same setting under other budgets.
        """
        row = next((row for row in known if not row["problem"]), None)
        try:
            quality = self.quality(path, point, progress) if row is None else row
            speed = self.speed(path, point)
        except (ValueError, MemoryError, OSError) as error:
            return failed(str(error))
        return {**{name: quality[name] for name in QUALITY}, **speed, "problem": ""}

    def quality(
        self, path: Path, point: Point, progress: Callable[[int], None] = lambda rows: None
    ) -> dict[str, Any]:
        """Raises like Engine, and ValueError for another tokenizer."""
        with Engine(path, **self.choices, **point.setting.choices) as engine:
            side = LiveSide(engine, str(path), {})
            plan = self.reference.plan
            found = compare_text(self.reference, side, plan, progress).as_dict()
            used = engine.config.top_k * (1 - engine.stats.dropped_share)
            in_memory = engine.plan.experts
        kl_low, kl_high = found["kl_mean_interval"]
        low, high = found["perplexity_ratio_interval"]
        values = (
            found["perplexity_b"], found["perplexity_ratio"], low, high, found["kl_mean"], kl_low,
            kl_high, found["kl_99"], found["top_1_agreement"], float(used), in_memory,
        )  # fmt: skip
        return dict(zip(QUALITY, values, strict=True))

    def speed(self, path: Path, point: Point) -> dict[str, Any]:
        """Raises like Engine."""
        with Engine(path, **self.choices, **point.choices) as engine:
            found = measure_speed(engine, self.prompt, self.answer, self.runs)
        read = found.stats.bytes_per_token / 1e6
        values = found.decode_tok_s, found.prefill_tok_s, found.stats.hit_rate, read
        return dict(zip(SPEED, values, strict=True))


def expert_bytes(checkpoint: Checkpoint, quantize: str) -> int:
    """What slots for all experts take, computed with as `quantize` says; 0 for a dense model."""
    if not checkpoint.config.sparse_layers:
        return 0
    store = ExpertStore(checkpoint, quantize)
    try:
        blocks = WholeBlocks(store)
        by_layer = (blocks if blocks.pays else store).layer_bytes  # as an engine has them in slots
    finally:
        store.close()
    return sum(by_layer)


def frontier(rows: Sequence[Mapping[str, str]]) -> list[int]:
    """Positions of the rows that no other one beats: that none is at least as fast as and at least
    as near to the reference as, and better in one of them. The nearest first."""
    done = [i for i, row in enumerate(rows) if not row["problem"]]
    done.sort(key=lambda i: (float(rows[i]["kl"]), -float(rows[i]["decode_tok_s"])))
    best, result = 0.0, []
    for i in done:
        if float(rows[i]["decode_tok_s"]) > best:
            best = float(rows[i]["decode_tok_s"])
            result.append(i)
    return result


def frontiers(rows: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """By budget, a frontier each: memory is what one has, not what one prefers."""
    result = {}
    for budget in dict.fromkeys(row["expert_ram"] for row in rows):
        under = [i for i, row in enumerate(rows) if row["expert_ram"] == budget]
        result[budget] = [under[i] for i in frontier([rows[i] for i in under])]
    return result
