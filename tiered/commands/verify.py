"""tiered verify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import notes, print_json, results
from tiered.commands.plan import number
from tiered.config import DEFAULT_POLICY, QUANTIZATIONS
from tiered.memory import format_bytes

if TYPE_CHECKING:
    from tiered.measuring.verify import Comparison, Verification


@click.command("verify")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@opt.option(
    "--shares", default="100,60,40", metavar="PERCENT", help="Budgets, in per cent of all experts."
)
@opt.option("--prompt-tokens", type=click.IntRange(2), default=32, help="Random tokens of prompt.")
@opt.option("--tokens", "num_tokens", type=click.IntRange(4), default=48, help="To generate.")
@opt.option(
    "--runs",
    type=click.IntRange(1),
    default=3,
    help="Of each budget, at least; of each stretch of tokens the quicker half counts.",
)
@opt.option("--policy", default=DEFAULT_POLICY, metavar="NAME", help="Eviction policy.")
@opt.option("--look-ahead", type=click.IntRange(0, 3), default=0, help="Layers; 0: off.")
@opt.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    default="int4",
    help="How a float checkpoint's weights are computed with.",
)
@opt.option("--threads", type=click.IntRange(1), help="Threads that compute. Default: all cores.")
@opt.option("--readers", type=click.IntRange(1), default=4, help="Threads that read from disk.")
@opt.json_option
def command(models: tuple[Path, ...], shares: str, as_json: bool, **choices: Any) -> None:
    """Forecast MODELS on this machine, run them, and print both side by side, term by term.

    Needs memory for the largest budget, and for a token's experts beside it. The routing is the
    model's own, on random tokens.
    """
    try:
        budgets = [float(part.strip().rstrip("%")) / 100 for part in shares.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--shares takes numbers, not {shares!r}") from error
    if not all(0 < share <= 1 for share in budgets):
        raise click.UsageError("--shares lie above 0 and are at most 100")
    found = []
    for model in models:
        with notes.status(f"opening {model.name}") as status:
            from tiered.measuring.verify import verify  # imports numba

            def progress(text: str, name: str = model.name) -> None:
                status.update(f"{name}: {text}")

            found.append(verify(model, budgets, progress=progress, **choices))
        if not as_json:
            _show(found[-1])
    worst = max(one.worst_error_pct for one in found)
    if as_json:
        print_json({"models": [one.as_dict() for one in found], "worst_error_pct": worst})
        return
    if len(found) > 1:
        results.print(_summary(found))
    results.print(f"worst error {worst:.1f} %")


def _show(found: Verification) -> None:
    """All terms of one model."""
    results.print(found.model.name, style="bold")
    for one in found.comparisons:
        results.print(_table(one))
    host, disk = found.hardware.host, found.hardware.disk
    results.print(
        f"memory {host.bandwidth:.1f} GB/s, {host.efficiency:.0%} of it by experts and "
        f"{host.attention_efficiency:.0%} by dense weights; disk {disk.bandwidth:.2f} GB/s\n",
        style="dim",
    )


def _summary(found: list[Verification]) -> Table:
    """A line for each model and budget."""
    table = Table("model", "of the experts", box=None, padding=(0, 2, 0, 0))
    for title in ("forecast tokens/s", "measured", "error"):
        table.add_column(title, justify="right")
    for one in found:
        for budget in one.comparisons:
            table.add_row(
                one.model.name, f"{budget.share:.0%}", number(budget.forecast_tok_s),
                number(budget.measured_tok_s), f"{budget.error_pct:+.1f} %",
            )  # fmt: skip
    return table


def _table(one: Comparison) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(
        f"{one.share:.0%} of the experts, {format_bytes(one.expert_ram)}", min_width=34
    )
    for title in ("forecast", "measured", "error"):
        table.add_column(title, justify="right", min_width=10)
    table.add_row(
        "tokens/s", number(one.forecast_tok_s), number(one.measured_tok_s),
        f"{one.error_pct:+.1f} %", style="bold",
    )  # fmt: skip
    table.add_row("hit rate", f"{one.forecast_hit_pct:.2f} %", f"{one.measured_hit_pct:.2f} %")
    for term, forecast in one.forecast_terms.items():
        measured = one.measured_terms[term]
        table.add_row(
            term, f"{forecast:.2f} ms", f"{measured:.2f} ms", f"{forecast - measured:+.2f} ms"
        )
    return table
