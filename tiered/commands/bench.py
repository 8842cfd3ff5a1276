"""tiered bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import gpu_lines, notes, print_json, results, steps_progress


@click.command("bench")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@opt.option("--prefill", type=click.IntRange(1), default=512, help="Tokens of prompt.")
@opt.option("--decode", type=click.IntRange(2), default=64, help="Tokens to generate.")
@opt.option("--runs", type=click.IntRange(1), default=1, help="Repeat, and report the median.")
@opt.option(
    "--kernels", is_flag=True, help="Measure the kernels of --device alone; MODEL is not needed."
)
@opt.plot_option("With --kernels: a roofline, as .png, .svg or .pdf.")
@opt.json_option
@opt.routing_options_short
@opt.engine_options
def command(
    model: Path | None,
    prefill: int,
    decode: int,
    runs: int,
    kernels: bool,
    plot: Path | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Measure MODEL's speed with random tokens, beside this machine's memory bandwidth."""
    if kernels:
        bench_kernels(choices["device"], choices["threads"], as_json, plot)
        return
    if plot is not None:
        raise click.UsageError("--plot goes with --kernels; `tiered sweep` plots a model's speed")
    if model is None:
        raise click.UsageError("give a MODEL, or --kernels")
    from tiered.measuring.bench import bench_model

    choices["context"] = choices["context"] or prefill + decode
    with open_engine(model, choices) as engine, notes.status("measuring"):
        report = bench_model(engine, prefill, decode, runs)
    if as_json:
        print_json(report)
        return
    results.print(
        f"prefill {report['prefill_tok_s']:.1f} tokens/s of {prefill}, "
        f"decode {report['decode_tok_s']:.2f} tokens/s of {decode}, "
        f"{report['threads']} threads, {report['isa']}"
    )
    results.print(
        f"decode reads {report['weights_gb_per_token']:.3f} GB of weights a token: "
        f"{report['decode_gb_s']:.1f} GB/s, {report['of_bandwidth']:.0%} of this machine's "
        f"{report['bandwidth_gb_s']:.1f} GB/s; Python takes {report['python_us_per_layer']:.0f} us "
        "a layer"
    )
    if simulated := report.get("simulated"):
        results.print(
            f"simulated, not measured: {simulated['card']}: prefill "
            f"{simulated['prefill_tok_s']:.1f} tokens/s, decode {simulated['decode_tok_s']:.2f} "
            f"tokens/s, {simulated['on_card']:.0%} of the experts were on the card"
        )
    for line in gpu_lines(report):
        results.print(line)
    if report["misses"]:
        results.print(
            f"hit rate {report['hit_rate']:.1%}, {report['bytes_per_token'] / 1e6:.1f} MB read "
            "from disk per token"
        )
    if report["dropped"]:
        results.print(
            f"rules drop {report['dropped']:.1%} of the experts, "
            f"{report['dropped_weight']:.1%} of the weight"
        )
    if report["routed_weight"]:
        share = report["skipped_weight"] / report["routed_weight"]
        results.print(
            f"{report['skipped_experts']} cold experts skipped, {share:.1%} of the routing weight"
        )
    if report["computed_weight"]:
        share = report["copied_weight"] / report["computed_weight"]
        results.print(
            f"{report['copied_experts']} experts read from the cold copy, {share:.1%} of the "
            "routing weight"
        )


def bench_kernels(device: str, threads: int | None, as_json: bool, plot: Path | None) -> None:
    """Every number format at expert shapes, beside memory and the libraries that are here; or on
    one GPU."""
    from tiered.backend import has_gpu
    from tiered.measuring.kernel_report import card_report, kernel_report, side_by_side

    if device == "auto":
        device = "cuda:0" if has_gpu() else "cpu"
    if "," in device or device == "cuda:all" or device.startswith("sim:"):
        raise click.UsageError(f"--kernels measures one real device, not {device}")

    with steps_progress() as bar:
        task = bar.add_task("compiling", total=None)

        def progress(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)

        on_cpu = device == "cpu"
        report = kernel_report(threads, progress) if on_cpu else card_report(device, progress)
    if plot is not None:
        from tiered.measuring.plot import plot_kernels

        plot_kernels(report, plot)
    if as_json:
        print_json(report)
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("format", "shape", "threads" if device == "cpu" else "device", "rows"):
        table.add_column(title, no_wrap=True)
    for title in ("GB/s", "of bandwidth", "GOPS", "of peak"):
        table.add_column(title, justify="right")
    for row in side_by_side(report):
        table.add_row(
            row["format"], "x".join(map(str, row["shape"])),
            str(row["threads"] if device == "cpu" else row["device"]), str(row["rows"]),
            f"{row['gb_s']:.1f}" if "gb_s" in row else "",
            f"{row['of_bandwidth']:.0%}" if "of_bandwidth" in row else "",
            f"{row['gops']:.0f}" if "gops" in row else "",
            f"{row['of_peak']:.0%}" if "of_peak" in row else "",
        )  # fmt: skip
    results.print(table)
    if report["layers"]:
        results.print(layer_table(report["layers"]))
    for note in report["notes"]:
        notes.print(note)


def layer_table(rows: list[dict[str, Any]]) -> Table:
    """Whole layers of decode."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("layer", "model", "format", "context", "threads"):
        table.add_column(title, no_wrap=True)
    for title in ("GB/s", "of bandwidth"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row["kernel"], row["model"], row["format"], str(row.get("context", "")),
            str(row["threads"]), f"{row['gb_s']:.1f}", f"{row['of_bandwidth']:.0%}",
        )  # fmt: skip
    return table
