"""Verify: forecast a model on this machine, run it, and put both side by side, term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

from tiered.engine import Engine
from tiered.experts import aligned
from tiered.kv_cache import PAGE_SIZE
from tiered.measuring.calibrate import Calibration, Measure, Sample
from tiered.measuring.chosen_experts import Usage
from tiered.memory import format_bytes
from tiered.planning.forecast import Forecast, Layout, forecast
from tiered.planning.hardware import Hardware, find
from tiered.planning.sizes import ModelSizes, of_checkpoint
from tiered.planning.synthetic import Routed
from tiered.planning.tokens import tokens_of
from tiered.tracing.trace import read_trace

Progress = Callable[[str], None]
STRETCH = 4  # tokens of a run, after as many whose operations are measured
ENOUGH = 4.0  # seconds of both: a budget has more runs until then, ...
MOST_RUNS = 4  # ... up to so many times what was asked for
TERMS = {  # of an engine, of a forecast
    "attention": (("attention",), ("attention",)),
    "router and experts": (("router", "experts"), ("router", "shared", "cpu_experts")),
    "waiting": (("waiting",), ("disk_wait",)),
    "head, sampling": (("head",), ("head",)),
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
    runs: int = 3,
    progress: Progress = lambda text: None,
    **choices: Any,
) -> Verification:
    """Compare for budgets of these shares of all experts; `choices` are Engine's.

    Each operation is measured by itself, on experts of which it is known whether they have to be
    read, and the model's routing is recorded; what the forecast has to find is what a budget makes
    of it. A stretch of tokens is run and one measured, by turns, so that forecast and run see the
    same machine. Each budget is run `runs` times or more, and does the same each time; other
    programs can only make it slower, so of each stretch, measured and run, the quicker half of all
    runs counts.
    """
    progress("recording the routing")
    subject = _prepared(path, max(shares), prompt_tokens, num_tokens, choices)
    found = [_verified(subject, share, runs, progress) for share in shares]
    return Verification(subject.model, found[-1][0], tuple(comparison for _, comparison in found))


class Subject(NamedTuple):
    """What is verified: a model, a text of so many tokens, and what its routers choose for it."""

    path: Path
    choices: dict[str, Any]
    model: ModelSizes
    prompt: list[int]
    other: list[int]  # the prompt of what is measured
    num_tokens: int
    routed: tuple[Routed, list[Routed]]  # the prompt, and token by token


def _prepared(
    path: Path, share: float, prompt_tokens: int, num_tokens: int, choices: dict[str, Any]
) -> Subject:
    """Raises MemoryError if less than `share` of the experts fit."""
    context = prompt_tokens + num_tokens
    room = 2 * aligned(context, PAGE_SIZE)  # tokens of two texts
    choices = {"look_ahead": 0, **choices, "context": context, "kv_tokens": room}
    with Engine(path, **choices) as engine:
        if engine.store is None:
            raise ValueError(f"{path} has no experts: there is nothing to forecast")
        vocab_size = engine.config.vocab_size
        model = of_checkpoint(engine.checkpoint, engine.choices.quantize, engine.choices.kv_dtype)
        if engine.blocks is not None:  # what a tier's slots take
            model = replace(model, experts=tuple(engine.blocks.blob_bytes))
        most = share * model.all_experts
        if engine.plan.slots < most:
            raise MemoryError(
                f"{share:.0%} of the experts are {format_bytes(int(most))}, and there is "
                f"memory for {format_bytes(engine.plan.slots)}: give smaller --shares"
            )
        prompt, other = (
            [Random(seed + index).randrange(vocab_size) for index in range(prompt_tokens)]
            for seed in (0, prompt_tokens)
        )
        routed = _record(engine, prompt, num_tokens)
    return Subject(path, choices, model, prompt, other, num_tokens, routed)


def _verified(
    subject: Subject, share: float, runs: int, progress: Progress
) -> tuple[Hardware, Comparison]:
    """What this machine was measured to be, and how a budget compares on it."""
    budget = int(share * subject.model.all_experts)
    limit = None if share >= 1 else budget
    length = len(subject.prompt) + subject.num_tokens // 2
    calibration = Calibration(subject.model, length, _usage(subject, budget))
    done: list[Run] = []
    while not _is_enough(done, runs):
        progress(f"run {len(done) + 1} with {share:.0%} of the experts")
        with (
            Engine(subject.path, expert_ram=limit, **subject.choices) as engine,
            calibration.beside(engine, subject.other) as measure,
        ):
            done.append(_run(engine, subject.prompt, subject.num_tokens, measure))
    chosen = _quicker_half(done)
    hardware = calibration.hardware([one.sample for places in chosen for one in places])
    guess = _forecast(subject, hardware, budget, done[0].mapped)
    return hardware, _compare(share, budget, guess, done, chosen)


class Stretch(NamedTuple):
    """Some tokens of a run, and what was measured right before them."""

    seconds: float
    parts: dict[str, float]
    sample: Sample


class Run(NamedTuple):
    stretches: list[Stretch]
    hit_rate: float
    mapped: bool  # whether the experts were

    @property
    def seconds(self) -> float:
        return sum(stretch.seconds for stretch in self.stretches)

    @property
    def measuring(self) -> float:
        return sum(stretch.sample.seconds for stretch in self.stretches)


def _is_enough(done: Sequence[Run], runs: int) -> bool:
    """What others do to this machine averages out over seconds."""
    seconds = sum(run.seconds + run.measuring for run in done)
    return len(done) >= runs and (seconds >= ENOUGH or len(done) >= MOST_RUNS * runs)


def _quicker_half(runs: Sequence[Run]) -> list[list[Stretch]]:
    """Of each stretch of a run."""
    return [
        sorted(stretches, key=lambda one: one.seconds + one.sample.seconds)[: (len(runs) + 1) // 2]
        for stretches in zip(*(run.stretches for run in runs), strict=True)
    ]


def _record(engine: Engine, prompt: list[int], num_tokens: int) -> tuple[Routed, list[Routed]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "routing.trace"
        with engine.record(file):
            list(engine.generate_tokens(prompt, num_tokens))
        return tokens_of(read_trace(file))


def _run(engine: Engine, prompt: list[int], num_tokens: int, measure: Measure) -> Run:
    """What decoding took."""
    if engine.plan.mapped:  # the first use of a page of the map costs more than the next
        list(engine.generate_tokens(prompt, num_tokens))
    tokens = engine.generate_tokens(prompt, num_tokens)
    next(tokens)  # the prompt is computed now
    stretches, clock, stats = [], engine.decoder.clock, engine.stats
    for index in range(0, num_tokens - 1, STRETCH):
        count = min(STRETCH, num_tokens - 1 - index)
        sample = measure(count)
        before, begin = dict(clock.seconds), perf_counter()
        for _ in range(count):
            next(tokens)
        seconds = perf_counter() - begin
        parts = {part: clock.seconds[part] - before[part] for part in before}
        parts["head"] += seconds - sum(parts.values())
        stretches.append(Stretch(seconds, parts, sample))
    return Run(stretches, (engine.stats - stats).hit_rate, engine.plan.mapped)


def _usage(subject: Subject, budget: int) -> Usage:
    """What of the experts will be missed, on any machine, and what will come again."""
    guess = _forecast(subject, find("desktop"), budget, mapped=True)
    _, tokens = subject.routed
    again = [
        len(set(before).intersection(after)) / len(after)
        for one, other in pairwise(tokens)
        for before, after in zip(one, other, strict=True)
        if after
    ]
    return Usage(subject.model.top_k * (1 - guess.ram_hit_pct / 100), fmean(again))


def _forecast(subject: Subject, hardware: Hardware, budget: int, mapped: bool) -> Forecast:
    model, choices, (prompt, tokens) = subject.model, subject.choices, subject.routed
    layout = Layout(model.dense, 0, 0, budget, model.all_experts, on_gpu=False)
    options = {name: choices[name] for name in ("policy", "look_ahead") if name in choices}
    return forecast(
        model, hardware, layout, tokens=tokens, prompt=prompt, mapped=mapped,
        context=choices["context"] - len(tokens) // 2, **options,
    )  # fmt: skip


def _compare(
    share: float,
    budget: int,
    guess: Forecast,
    runs: Sequence[Run],
    chosen: Sequence[Sequence[Stretch]],
) -> Comparison:
    count = sum(len(stretches[0].sample.parts) for stretches in chosen)
    seconds = sum(fmean(one.seconds for one in stretches) for stretches in chosen)

    def measured(part: str) -> float:
        return sum(fmean(one.parts[part] for one in stretches) for stretches in chosen) / count

    return Comparison(
        share=share,
        expert_ram=budget,
        forecast_tok_s=guess.tok_s,
        measured_tok_s=count / seconds,
        forecast_hit_pct=guess.ram_hit_pct,
        measured_hit_pct=100 * runs[0].hit_rate,
        forecast_terms={
            name: 1e3 * sum(guess.terms[term] for term in terms)
            for name, (_, terms) in TERMS.items()
        },
        measured_terms={
            name: 1e3 * sum(map(measured, parts)) for name, (parts, _) in TERMS.items()
        },
        runs_tok_s=[count / run.seconds for run in runs],
    )
