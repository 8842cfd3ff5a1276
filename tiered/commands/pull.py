"""tiered pull"""

from __future__ import annotations

import click

from tiered.commands import options as opt
from tiered.commands.output import bytes_progress, notes, print_json, results
from tiered.memory import available_bytes, format_bytes


@click.command("pull")
@click.argument("model")
@opt.option("--dry-run", is_flag=True, help="Tell what it takes, and download nothing.")
@opt.json_option
def command(model: str, dry_run: bool, as_json: bool) -> None:
    """Download MODEL, a user/repo or user/repo:QUANT of the Hugging Face hub, or an alias.

    It goes into the hub's own cache (HF_HOME), is checked, and goes on where it was interrupted.
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean elsewhere.
    """
    from tiered.hub.download import Name, list_remote, pull

    name = Name.parse(model)
    listing = list_remote(name)
    free = available_bytes()
    share = min(1.0, free / max(1, listing.nbytes))
    notes.print(
        f"{name}: {format_bytes(listing.nbytes)} in {len(listing.files)} files; this machine has "
        f"{format_bytes(free)} of memory for it, {share:.0%} of that",
        style="dim",
    )
    facts = {"model": str(name), "commit": listing.commit, "bytes": listing.nbytes}
    if not dry_run:
        with bytes_progress() as bar:
            task = bar.add_task(str(name), total=listing.nbytes)
            facts["path"] = str(pull(name, listing, lambda count: bar.advance(task, count)))
    if as_json:
        print_json(facts)
    elif not dry_run:
        results.print(facts["path"])
