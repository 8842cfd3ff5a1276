"""tiered rm"""

from __future__ import annotations

import click

from tiered.commands import options as opt
from tiered.commands.output import notes
from tiered.memory import format_bytes


@click.command("rm")
@click.argument("models", nargs=-1, required=True)
@opt.option("--yes", "-y", is_flag=True, help="Do not ask.")
def command(models: tuple[str, ...], yes: bool) -> None:
    """Delete MODELS, named as `tiered ls` lists them, from this machine."""
    from tiered.hub.download import Name
    from tiered.hub.pulled import matches, pulled, remove

    for text in models:
        name = Name.parse(text)
        found = [model for model in pulled() if matches(model, name)]
        if not found:
            raise click.UsageError(f"{text} is not on this machine")
        for model in found:
            size = format_bytes(model.nbytes)
            if yes or click.confirm(f"delete {model.name} ({size})?"):
                notes.print(f"deleted {model.name}: {format_bytes(remove(model))}")
