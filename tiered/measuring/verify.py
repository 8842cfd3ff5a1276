"""Verify: forecast a model on this machine, run it, and put both side by side, term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from tiered.engine import Engine
from tiered.measuring.calibrate import Calibration
from tiered.planning.forecast import Forecast, Layout, forecast
from tiered.planning.hardware import Hardware
from tiered.planning.sizes import ModelSizes, of_checkpoint
from tiered.planning.synthetic import Routed
from tiered.planning.tokens import tokens_of
from tiered.stats import EngineStats
from tiered.tracing.trace import read_trace

Progress = Callable[[str], None]
AGREE = 1.05  # the second quickest run takes so many times what the quickest took, at most ...
PATIENCE = 3  # ... or there are more runs, up to so many times what was asked for
TERMS = {  # of an engine: of a forecast
    "attention": ("attention",),
    "router": ("router",),
    "experts": ("shared", "cpu_experts"),
    "waiting": ("disk_wait",),
    "head": ("head",),
}


@dataclass(frozen=True)
class Comparison:
    """One budget; times are milliseconds of an average token."""

    share: float  # of the experts that fit
    expert_ram: int
    forecast_tok_s: float
    measured_tok_s: float
    forecast_hit_pct: float
    measured_hit_pct: float
    forecast_terms: dict[str, float]
    measured_terms: dict[str, float]
    runs_tok_s: list[float]

    @property
    def error_pct(self) -> float:
        """Of the forecast speed; positive: the machine was slower than forecast."""
        return 100 * (self.forecast_tok_s / self.measured_tok_s - 1)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error_pct": self.error_pct}


@dataclass(frozen=True)
class Verification:
    model: ModelSizes
    hardware: Hardware
    comparisons: tuple[Comparison, ...]

    @property
    def worst_error_pct(self) -> float:
        return max(abs(comparison.error_pct) for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "hardware": self.hardware.as_dict(),
            "worst_error_pct": self.worst_error_pct,
            "comparisons": [comparison.as_dict() for comparison in self.comparisons],
        }


def verify(
    path: Path,
    shares: Sequence[float] = (1.0, 0.6, 0.4),
    *,
    prompt_tokens: int = 32,
    num_tokens: int = 48,
    runs: int = 2,
    progress: Progress = lambda text: None,
    **choices: Any,
) -> Verification:
    """Compare for budgets of these shares of all experts; `choices` are Engine's.

    Each operation is measured by itself, and the model's routing recorded, with all experts in
    memory; what the forecast has to find is what a smaller budget makes of it. Operations are
    measured anew before every run, so that forecast and run see the same machine, and of both the
    quicker quarter counts: other programs can only make something slower. Each budget is run
    `runs` times, and if its two quickest differ by more than `AGREE` up to `PATIENCE` times as
    often.
    """
    context = prompt_tokens + num_tokens
    choices = {"look_ahead": 0, **choices, "context": context}
    progress("recording the routing")
    with Engine(path, **choices) as engine:
        if engine.store is None:
            raise ValueError(f"{path} has no experts: there is nothing to forecast")
        vocab_size = engine.config.vocab_size
        model = of_checkpoint(engine.checkpoint, engine.choices.quantize, engine.choices.kv_dtype)
        if engine.plan.slots < model.all_experts:
            raise MemoryError("verify needs memory for all experts at once, to measure with")
        prompt = [Random(index).randrange(vocab_size) for index in range(prompt_tokens)]
        routed = _record(engine, prompt, num_tokens)
    found = []
    for share in shares:
        budget = int(share * model.all_experts)
        limit = None if share >= 1 else budget
        calibration = Calibration(model, prompt_tokens + num_tokens // 2)
        done: list[Run] = []
        while not _is_enough(done, runs):
            progress(f"run {len(done) + 1} with {share:.0%} of the experts")
            with Engine(path, **choices) as engine:
                calibration.measure(engine)
            done.append(_run(path, prompt, num_tokens, limit, choices))
        hardware = calibration.hardware(done[0].mapped)
        guess = _forecast(model, hardware, budget, done[0].mapped, routed, choices)
        found.append(_compare(share, budget, guess, done))
    return Verification(model, hardware, tuple(found))


class Run(NamedTuple):
    seconds: list[float]  # of each token
    stats: EngineStats  # of all of them
    mapped: bool  # whether the experts were


def _is_enough(done: Sequence[Run], runs: int) -> bool:
    """Two runs of a budget do the same, so two that took the same were not disturbed."""
    if len(done) < runs:
        return False
    quickest, *others = sorted(sum(run.seconds) for run in done)
    return not others or others[0] <= AGREE * quickest or len(done) >= PATIENCE * runs


def _record(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[Routed, list[Routed]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "routing.trace"
        with engine.record(file):
            list(engine.generate_tokens(prompt, num_tokens))
        return tokens_of(read_trace(file))


def _run(
    path: Path, prompt: list[int], num_tokens: int, expert_ram: int | None, choices: dict[str, Any]
) -> Run:
    """What decoding took."""
    with Engine(path, expert_ram=expert_ram, **choices) as engine:
        if engine.plan.mapped:  # the first use of a page of the map costs more than the next
            list(engine.generate_tokens(prompt, num_tokens))
        tokens = engine.generate_tokens(prompt, num_tokens)
        next(tokens)  # the prompt is computed now
        before = engine.stats
        times = [perf_counter(), *(perf_counter() for _ in tokens)]
        seconds = [after - start for start, after in pairwise(times)]
        return Run(seconds, engine.stats - before, engine.plan.mapped)


def _forecast(
    model: ModelSizes,
    hardware: Hardware,
    budget: int,
    mapped: bool,
    routed: tuple[Routed, list[Routed]],
    choices: dict[str, Any],
) -> Forecast:
    prompt, tokens = routed
    layout = Layout(model.dense, 0, 0, budget, model.all_experts, on_gpu=False)
    options = {name: choices[name] for name in ("policy", "look_ahead") if name in choices}
    return forecast(
        model, hardware, layout, tokens=tokens, prompt=prompt, mapped=mapped,
        context=choices["context"] - len(tokens) // 2, **options,
    )  # fmt: skip


def _compare(share: float, budget: int, guess: Forecast, runs: Sequence[Run]) -> Comparison:
    """A token does the same in every run: of its times the quicker quarter counts."""
    seconds = np.percentile([run.seconds for run in runs], 25, axis=0)
    stats = min(runs, key=lambda run: sum(run.seconds)).stats
    count = len(seconds)
    return Comparison(
        share=share,
        expert_ram=budget,
        forecast_tok_s=guess.tok_s,
        measured_tok_s=count / float(seconds.sum()),
        forecast_hit_pct=guess.ram_hit_pct,
        measured_hit_pct=100 * stats.hit_rate,
        forecast_terms={
            name: 1e3 * sum(guess.terms[term] for term in terms) for name, terms in TERMS.items()
        },
        measured_terms={name: 1e3 * stats.parts[name] / count for name in TERMS},
        runs_tok_s=[count / sum(run.seconds) for run in runs],
    )
