"""tiered ls"""

from __future__ import annotations

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import notes, print_json, results
from tiered.memory import format_bytes


@click.command("ls")
@opt.json_option
def command(as_json: bool) -> None:
    """List the models of the hub that are on this machine."""
    from tiered.hub.pulled import pulled

    models = pulled()
    if as_json:
        rows = [{"name": str(m.name), "bytes": m.nbytes, "path": str(m.path)} for m in models]
        print_json({"models": rows})
        return
    if not models:
        notes.print("no models: tiered pull user/repo downloads one")
        return
    table = Table("name", "size", box=None, pad_edge=False)
    for model in models:
        table.add_row(str(model.name), format_bytes(model.nbytes))
    results.print(table)
