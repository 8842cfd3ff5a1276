"""tiered convert"""

from __future__ import annotations

from pathlib import Path

import click

from tiered.commands import options as opt
from tiered.commands.output import bytes_progress, notes, print_json
from tiered.config import QUANTIZATIONS
from tiered.memory import format_bytes


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    default="int4",
    help="What becomes of float experts (int4: Q4_0). Quantized ones stay as they are.",
)
@opt.json_option
def command(source: Path, destination: Path, quantize: str, as_json: bool) -> None:
    """Write the checkpoint SOURCE as a store, the folder DESTINATION, which opens faster.

    A store has each expert's matrices side by side and quantized once. It opens only when it is
    complete: an interrupted conversion leaves nothing that could be mistaken for a model.
    """
    from tiered.weights.convert import convert

    with bytes_progress() as bar:
        task = bar.add_task("converting", total=None)
        convert(
            source,
            destination,
            quantize,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    if as_json:
        print_json({"destination": str(destination), "bytes": size})
    else:
        notes.print(f"wrote {destination}: {format_bytes(size)}")
