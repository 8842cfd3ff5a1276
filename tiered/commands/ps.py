"""tiered ps"""

from __future__ import annotations

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import notes, print_json, results
from tiered.memory import format_bytes


@click.command("ps")
@opt.json_option
def command(as_json: bool) -> None:
    """List the servers that you run on this machine."""
    import psutil

    from tiered.serve.running import running

    servers = running()
    for server in servers:
        server["memory_bytes"] = psutil.Process(server["pid"]).memory_info().rss
    if as_json:
        print_json({"servers": servers})
        return
    if not servers:
        notes.print("no server runs: tiered serve MODEL starts one")
        return
    table = Table("pid", "name", "address", "memory", box=None, pad_edge=False)
    for server in servers:
        memory = format_bytes(server["memory_bytes"])
        table.add_row(str(server["pid"]), server["name"], server["url"], memory)
    results.print(table)
