"""tiered sweep"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.lists import budgets, integers, sizes, split
from tiered.commands.output import notes, print_json, results, steps_progress
from tiered.commands.plan import describe, number
from tiered.config import DEFAULT_POLICY
from tiered.measuring import sweep as sweeps
from tiered.measuring.results import ResultFile
from tiered.memory import format_bytes
from tiered.planning import hardware
from tiered.planning.hardware import Hardware
from tiered.planning.sizes import RECIPES, ModelSizes
from tiered.planning.strategies import STRATEGIES


@click.command("sweep")
@click.argument("model")
@opt.option(
    "--gpu",
    metavar="NAMES",
    default="rtx4060ti-16gb",
    help="Described machines, or FILE.toml, separated by commas.",
)
@opt.option("--vram", metavar="SIZES", help="GPU memory: 8G,12G,16G. Default: the machine's.")
@opt.option("--ram", metavar="SIZES", help="RAM: 16G,32G. Default: the machine's.")
@opt.option(
    "--expert-ram",
    metavar="SIZES",
    help="With --live: budgets for experts, 2G,3G or 100%,60%,40% of them.",
)
@opt.option("--strategy", metavar="NAMES", default="tiered", help=f"{', '.join(STRATEGIES)}.")
@opt.option("--policy", metavar="NAMES", default=DEFAULT_POLICY, help="Eviction policies.")
@opt.option("--look-ahead", metavar="LAYERS", default="1", help="0 (off) to 3, as 0,1,2.")
@opt.option("--top-k", metavar="COUNTS", default="0", help="Experts per token; 0: the model's own.")
@opt.option("--context", metavar="TOKENS", default="1024", help="Lengths of context.")
@opt.option(
    "--quant",
    type=click.Choice(list(RECIPES)),
    default="q4_0",
    help="Number formats of a known model; a file has its own.",
)
@opt.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Routing from a recorded trace. Default: synthetic.",
)
@opt.option(
    "--locality",
    type=click.Choice(["weak", "typical", "strong"]),
    default="typical",
    help="How predictable synthetic routing is.",
)
@opt.option("--live", is_flag=True, help="Run the engine on this machine instead of simulating.")
@opt.option("--tokens", type=click.IntRange(2), default=32, help="With --live: to generate.")
@opt.option(
    "--ray", is_flag=True, help="Simulate on the workers of a Ray cluster, or on all cores."
)
@opt.option("--out", type=click.Path(path_type=Path), help="CSV file; what it has is not repeated.")
@opt.plot_option()
@opt.json_option
def command(
    model: str,
    gpu: str,
    quant: str,
    trace: Path | None,
    locality: str,
    live: bool,
    tokens: int,
    ray: bool,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    **axes: Any,
) -> None:
    """Speed of MODEL over a grid of memory sizes, policies and lengths: a table, CSV and a plot.

    MODEL is a file, a folder or a known model's name. Options that take several values, separated
    by commas, span the grid. By default it is simulated on described machines; with --ray on the
    cluster that RAY_ADDRESS names, or on all cores of this machine.
    """
    if ray and live:
        raise click.UsageError("--ray spreads simulations; --live measures this machine alone")
    described = describe(model, quant, "f16")
    file = ResultFile(out, sweeps.COLUMNS, sweeps.NUM_KEYS)
    machines: dict[str, Hardware | None] = {"this machine": None}
    if not live:
        machines = {name: hardware.find(name) for name in split(gpu)}
    wanted = _live_points(described, axes) if live else _points(axes)
    routing = "the model's own" if live else trace.name if trace else f"synthetic, {locality}"
    work = [
        (machine, point, sweeps.key(described.name, name, routing, point))
        for name, machine in machines.items()
        for point in wanted
    ]
    measure = _engine(model, tokens) if live else _simulation(described, trace, locality)
    new = [(machine, point, key) for machine, point, key in work if key not in file]
    with steps_progress() as progress:
        task = progress.add_task("sweep", total=len(work), completed=len(work) - len(new))
        calls = [(machine, point) for machine, point, _ in new]
        each = _each_on_ray if ray else _each
        for position, got in each(measure, calls):
            file.append({**new[position][2], **got})
            progress.advance(task)
    rows = [file.find(key) for *_, key in work]
    if plot is not None:
        _plot(rows, plot, described, list(machines.values()), live)
    if as_json:
        print_json({"simulated": not live, "rows": rows})
    else:
        _show(rows, live)


def _each(function: Any, calls: list[Any]) -> Iterator[Any]:
    """(position, result) of each call."""
    for position, call in enumerate(calls):
        yield position, function(*call)


def _each_on_ray(function: Any, calls: list[Any]) -> Iterator[Any]:
    from tiered.cluster import each

    try:
        yield from each(function, calls)
    except ImportError as error:
        raise click.UsageError(f'{error}; pip install "tiered[ray]" brings it') from None


def _points(axes: dict[str, Any]) -> list[sweeps.Point]:
    if axes["expert_ram"]:
        raise click.UsageError("--expert-ram goes with --live; RAM that is simulated is --ram")
    strategies = split(axes["strategy"])
    for name in strategies:
        if name not in STRATEGIES:
            raise click.UsageError(f"no strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return list(
        sweeps.grid(
            strategy=strategies,
            policy=split(axes["policy"]),
            look_ahead=integers("--look-ahead", axes["look_ahead"], most=3),
            top_k=integers("--top-k", axes["top_k"]),
            context=integers("--context", axes["context"], least=1),
            ram=sizes(axes["ram"]),
            vram=sizes(axes["vram"]),
        )
    )


def _live_points(model: ModelSizes, axes: dict[str, Any]) -> list[sweeps.Point]:
    for name in ("vram", "ram"):
        if axes[name]:
            raise click.UsageError(f"--{name} is simulated; with --live give --expert-ram")
    return list(
        sweeps.grid(
            policy=split(axes["policy"]),
            look_ahead=integers("--look-ahead", axes["look_ahead"], most=3),
            context=integers("--context", axes["context"], least=1),
            ram=budgets(axes["expert_ram"], model.all_experts),
        )
    )


def _simulation(model: ModelSizes, trace: Path | None, locality: str) -> Any:
    if trace is None:
        return lambda machine, point: sweeps.simulate(model, machine, point, locality=locality)
    from tiered.planning.tokens import tokens_of
    from tiered.tracing.trace import read_trace

    recorded = read_trace(trace)
    if len(recorded.info.blob_bytes) != model.num_layers:
        raise ValueError(
            f"{trace} was recorded from a model of {len(recorded.info.blob_bytes)} layers, "
            f"but {model.name} has {model.num_layers}"
        )

    def simulate(machine: Hardware, point: sweeps.Point) -> dict[str, Any]:
        prompt, tokens = tokens_of(recorded, point.top_k or None)
        return sweeps.simulate(model, machine, point, tokens=tokens, prompt=prompt)

    return simulate


def _engine(model: str, tokens: int) -> Any:
    path = Path(model)
    prompt = _prompt(path)
    return lambda _, point: sweeps.run_live(path, point, prompt=prompt, num_tokens=tokens)


def _prompt(path: Path) -> list[int]:
    """Token ids that any model has; random ones, always the same."""
    from random import Random

    from tiered.formats import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        vocab_size = checkpoint.config.vocab_size
    return [Random(index).randrange(vocab_size) for index in range(16)]


def _plot(
    rows: list[dict[str, str]], path: Path, model: ModelSizes, machines: list[Any], live: bool
) -> None:
    from tiered.measuring.plot import plot_sweep

    described = [machine for machine in machines if machine is not None]
    where = described[0].label if len(described) == 1 else f"{len(described)} machines"
    roofs: dict[str, float] = {}
    if len(described) == 1:
        roofs = sweeps.roofs(model, described[0])
    for machine in described[1:] and described:
        fastest, roof = next(iter(sweeps.roofs(model, machine).items()))
        roofs[f"the {fastest} of {machine.name}"] = roof
    plot_sweep(
        rows, path, roofs, model.name,
        "measured on this machine" if live else f"SIMULATED, not measured: {where}",
    )  # fmt: skip
    notes.print(f"wrote {path}", style="dim")


def _show(rows: list[dict[str, str]], live: bool) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    varied = [
        name for name in ("hardware", *sweeps.POINT) if len({row[name] for row in rows}) > 1
    ] or ["hardware"]
    for name in varied:
        table.add_column(name.replace("_", "-"), no_wrap=True)
    for title in ("tokens/s", "ms/token", "to first", "on GPU", "in RAM", "MB read"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            format_bytes(int(row[name])) if name in ("vram", "ram") else row[name]
            for name in varied
        ]
        if row["problem"]:
            table.add_row(*cells, "does not run")
            continue
        table.add_row(
            *cells, number(float(row["tok_s"])), f"{float(row['ms_per_token']):.1f}",
            f"{float(row['time_to_first_token']):.2f} s", f"{float(row['vram_hit_pct']):.1f} %",
            f"{float(row['ram_hit_pct']):.1f} %", f"{float(row['read_mb_per_token']):.1f}",
        )  # fmt: skip
    results.print(table)
    results.print("measured" if live else "simulated, not measured", style="dim")
