"""Verify: forecast a model on this machine, run it, and put both side by side, term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from tiered.engine import Engine
from tiered.measuring.calibrate import calibrate
from tiered.planning.forecast import Forecast, Layout, forecast
from tiered.planning.hardware import Hardware
from tiered.planning.sizes import ModelSizes, of_checkpoint
from tiered.planning.synthetic import Routed
from tiered.planning.tokens import tokens_of
from tiered.stats import EngineStats
from tiered.tracing.trace import read_trace

Progress = Callable[[str], None]
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
    runs: int = 1,
    progress: Progress = lambda text: None,
    **choices: Any,
) -> Verification:
    """Compare for budgets of these shares of all experts; `choices` are Engine's.

    The fastest of `runs` counts: other programs can only make a run slower.

    Each operation is measured by itself, and the model's routing recorded, with all experts in
    memory; what the forecast has to find is what a smaller budget makes of it.
    """
    context = prompt_tokens + num_tokens
    choices = {"look_ahead": 0, **choices, "context": context}
    progress("measuring operations")
    with Engine(path, **choices) as engine:
        if engine.store is None:
            raise ValueError(f"{path} has no experts: there is nothing to forecast")
        vocab_size = engine.config.vocab_size
        model = of_checkpoint(engine.checkpoint, engine.choices.quantize, engine.choices.kv_dtype)
        if engine.plan.slots < model.all_experts:
            raise MemoryError("verify needs memory for all experts at once, to measure with")
        hardware = calibrate(engine, model, prompt_tokens + num_tokens // 2)
    prompt = [Random(index).randrange(vocab_size) for index in range(prompt_tokens)]
    progress("recording the routing")
    routed = _record(path, prompt, num_tokens, choices)
    found = []
    for share in shares:
        budget = int(share * model.all_experts)
        progress(f"running with {share:.0%} of the experts")
        limit = None if share >= 1 else budget
        results = [_run(path, prompt, num_tokens, limit, choices) for _ in range(runs)]
        stats, mapped = max(results, key=lambda result: result[0].decode_tok_s)
        guess = _forecast(model, hardware, budget, mapped, routed, choices)
        found.append(_compare(share, budget, guess, stats))
    return Verification(model, hardware, tuple(found))


def _record(
    path: Path, prompt: list[int], num_tokens: int, choices: dict[str, Any]
) -> tuple[Routed, list[Routed]]:
    with TemporaryDirectory() as folder, Engine(path, **choices) as engine:
        file = Path(folder) / "routing.trace"
        with engine.record(file):
            list(engine.generate_tokens(prompt, num_tokens))
        return tokens_of(read_trace(file))


def _run(
    path: Path, prompt: list[int], num_tokens: int, expert_ram: int | None, choices: dict[str, Any]
) -> tuple[EngineStats, bool]:
    """What decoding took, and whether the experts were mapped."""
    with Engine(path, expert_ram=expert_ram, **choices) as engine:
        if engine.plan.mapped:  # the first use of a page of the map costs more than the next
            list(engine.generate_tokens(prompt, num_tokens))
        tokens = engine.generate_tokens(prompt, num_tokens)
        next(tokens)  # the prompt is computed now
        before = engine.stats
        list(tokens)
        after = engine.stats
        stats = after - before
        stats.new_tokens += 1  # the first comes out of the prompt, and takes no time
        return stats, engine.plan.mapped


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


def _compare(share: float, budget: int, guess: Forecast, stats: EngineStats) -> Comparison:
    count = stats.new_tokens - 1
    return Comparison(
        share=share,
        expert_ram=budget,
        forecast_tok_s=guess.tok_s,
        measured_tok_s=stats.decode_tok_s,
        forecast_hit_pct=guess.ram_hit_pct,
        measured_hit_pct=100 * stats.hit_rate,
        forecast_terms={
            name: 1e3 * sum(guess.terms[term] for term in terms) for name, terms in TERMS.items()
        },
        measured_terms={name: 1e3 * stats.parts[name] / count for name in TERMS},
    )
