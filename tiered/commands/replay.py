"""tiered replay"""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import print_json, results
from tiered.config import DEFAULT_POLICY
from tiered.memory import format_bytes, parse_bytes


@click.command("replay")
@click.argument("trace", type=click.Path(path_type=Path))
@opt.option(
    "--policy",
    default=DEFAULT_POLICY,
    metavar="NAMES",
    help="Eviction policies, separated by commas; belady is the offline bound.",
)
@opt.option(
    "--expert-ram",
    metavar="SIZES",
    required=True,
    help="Budgets for experts, separated by commas: 2G,3000M.",
)
@opt.option(
    "--counting",
    type=click.Choice(["exact", "published"]),
    help="As a live tier counts, or as the published rates of CSV traces do. "
    "Default: exact for what `tiered trace` recorded under a budget, published for others.",
)
@opt.json_option
def command(trace: Path, policy: str, expert_ram: str, counting: str | None, as_json: bool) -> None:
    """Replay a recorded routing TRACE through the tier's own bookkeeping: hit rates in seconds.

    TRACE is a file of `tiered trace`, or a CSV trace. With --json, one policy and one budget give
    one object, several a list under "results". From a million routed experts in all, a compiled
    twin of the bookkeeping counts, which gives the same numbers sooner.
    """
    from tiered.tracing.compiled import WORTH_LOADING
    from tiered.tracing.replay import replay
    from tiered.tracing.trace import read_trace

    recorded = read_trace(trace)
    cases = [(name.strip(), size) for name in policy.split(",") for size in expert_ram.split(",")]
    compile = recorded.num_routed * len(cases) >= WORTH_LOADING
    rows = [replay(recorded, name, parse_bytes(size), counting, compile) for name, size in cases]
    if as_json:
        print_json(
            rows[0].as_dict() if len(rows) == 1 else {"results": [r.as_dict() for r in rows]}
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("policy")
    for title in ("budget", "hit rate", "of decode", "read", "per token"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.policy, format_bytes(row.budget_bytes), f"{row.hit_pct_cum:.2f} %",
            f"{row.hit_pct_decode:.2f} %", format_bytes(row.read_bytes),
            format_bytes(row.bytes_per_token),
        )  # fmt: skip
    results.print(table)
