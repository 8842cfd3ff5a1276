"""tiered stop"""

from __future__ import annotations

import click

from tiered.commands.output import notes


@click.command("stop")
@click.argument("server", required=False)
def command(server: str | None) -> None:
    """End a server, by its name, pid or address as `tiered ps` lists them; what it has begun it
    finishes. Without SERVER: the only one that runs."""
    from tiered.serve.running import running, stop

    servers = running()
    if server is None and len(servers) > 1:
        names = ", ".join(str(facts["pid"]) for facts in servers)
        raise click.UsageError(f"several servers run: name one of {names}")
    chosen = [
        facts
        for facts in servers
        if server is None or server in (str(facts["pid"]), facts["name"], facts["url"])
    ]
    if not chosen:
        raise click.UsageError(f"no server {server!r} runs" if server else "no server runs")
    for facts in chosen:
        stop(facts)
        notes.print(f"asked {facts['name']} (pid {facts['pid']}) to end")
