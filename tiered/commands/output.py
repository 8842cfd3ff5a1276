"""What commands print: text on standard output, everything about it on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tiered.memory import format_bytes
from tiered.stats import EngineStats

if TYPE_CHECKING:
    from tiered.engine import Engine

results = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    click.echo(json.dumps(result, indent=2))


def give_json(result: dict[str, Any], file: str | None) -> bool:
    """Write `result` to `file`, if there is one; "-" prints it. Whether a text should follow."""
    if file == "-":
        print_json(result)
    elif file is not None:
        Path(file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return file != "-"


def stats_line(stats: EngineStats) -> str:
    """One line about a generation."""
    parts = [
        f"{stats.new_tokens} tokens, {stats.decode_tok_s:.1f} tokens/s",
        f"first after {stats.prefill_seconds:.2f} s ({stats.prompt_tokens} of prompt)",
    ]
    if stats.hits or stats.misses:
        parts.append(f"hit rate {stats.hit_rate:.1%}")
        parts.append(f"{format_bytes(round(stats.bytes_per_token))} read per token")
    if stats.prefetches:
        parts.append(f"{stats.prefetches_used} of {stats.prefetches} prefetches used")
    if rules := rules_line(stats):
        parts.append(rules)
    if stats.routed_weight:
        share = stats.skipped_weight / stats.routed_weight
        parts.append(f"{stats.skipped_experts} cold experts skipped, {share:.1%} of the weight")
    if stats.computed_weight:
        share = stats.copied_weight / stats.computed_weight
        parts.append(f"{stats.copied_experts} from the cold copy, {share:.1%} of the weight")
    if stats.drafted:
        parts.append(f"{stats.drafted_right} of {stats.drafted} drafted tokens right")
    return " · ".join(parts)


def simulated_line(engine: Engine) -> str:
    """What a described card (--device sim:CARD) would have taken; empty for what is real."""
    stats = engine.stats
    source: Any = engine.decoder.source  # of the cards
    if not engine.timing.label or not stats.simulated_prefill_seconds:
        return ""
    parts = [f"simulated, not measured: {engine.timing.label}"]
    if speed := stats.simulated_decode_tok_s:
        parts.append(f"{1e3 / speed:.1f} ms a token ({speed:.1f} tokens/s)")
    parts.append(f"first after {stats.simulated_prefill_seconds:.2f} s")
    if source is not None:
        asked = source.hits + source.copies + source.computed_in_ram
        parts.append(
            f"{source.hits / max(1, asked):.0%} of the experts were on the card, "
            f"{source.copies / max(1, asked):.0%} were copied there"
        )
    return " · ".join(parts)


def gpu_lines(report: dict[str, Any]) -> Iterator[str]:
    """What a report has of Engine.gpu_facts."""
    for name, card in report.get("cards", {}).items():
        first, last = card["layers"]
        graphs = f", CUDA graphs: {card['cuda_graphs']}" if "cuda_graphs" in card else ""
        yield f"{name}: layers {first} to {last}{graphs}"
    if locked := report.get("page_locked_bytes"):
        yield f"{format_bytes(locked)} of RAM are page-locked for copies to GPUs"


def rules_line(stats: EngineStats) -> str:
    """What rules for the routers took away; empty without one."""
    if not stats.dropped_experts:
        return ""
    return (
        f"rules drop {stats.dropped_share:.1%} of the experts, "
        f"{stats.dropped_weight_share:.1%} of the weight"
    )


def rules_report(stats: EngineStats) -> dict[str, float]:
    """The same for JSON."""
    if not stats.dropped_experts:
        return {}
    return {"dropped": stats.dropped_share, "dropped_weight": stats.dropped_weight_share}


def bytes_progress() -> Progress:
    """A progress bar for bytes."""
    return _progress(DownloadColumn(binary_units=True), TransferSpeedColumn())


def show_steps(bar: Progress) -> Callable[[str, int, int], None]:
    """What shows steps done, of how many, of what is being done: a line each, as they come."""
    tasks: dict[str, TaskID] = {}

    def show(doing: str, done: int, total: int) -> None:
        if doing not in tasks:
            tasks[doing] = bar.add_task(doing, total=total)
        bar.update(tasks[doing], completed=done, total=total)

    return show


def steps_progress() -> Progress:
    """A progress bar for steps."""
    return _progress(MofNCompleteColumn())


def _progress(*columns: ProgressColumn) -> Progress:
    """On standard error; gone when done, and not there at all where nobody sees it move."""
    first = TextColumn("{task.description}"), BarColumn()
    return Progress(
        *first, *columns, TimeRemainingColumn(),
        console=notes, transient=True, disable=not notes.is_terminal,
    )  # fmt: skip
