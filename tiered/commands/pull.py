"""tiered pull"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import options as opt
from tiered.commands.output import bytes_progress, notes, print_json, results
from tiered.memory import default_limit, format_bytes

if TYPE_CHECKING:
    from tiered.hub.download import Listing, Name


@click.command("pull")
@click.argument("model")
@opt.option("--dry-run", is_flag=True, help="Tell what it takes, and download nothing.")
@opt.json_option
def command(model: str, dry_run: bool, as_json: bool) -> None:
    """Download MODEL, a user/repo or user/repo:QUANT of the Hugging Face hub, or an alias.

    Before the download, its headers tell what memory it needs, beside what is free here. It goes
    into the hub's own cache (HF_HOME), is checked, and goes on where it was interrupted.
    HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean elsewhere.
    """
    from tiered.hub.download import Name, list_remote, pull

    name = Name.parse(model)
    listing = list_remote(name)
    notes.print(
        f"{name}: {format_bytes(listing.nbytes)} in {len(listing.files)} files", style="dim"
    )
    facts = {"model": str(name), "commit": listing.commit, "bytes": listing.nbytes}
    facts |= foresee(name, listing)
    if not dry_run:
        with bytes_progress() as bar:
            task = bar.add_task(str(name), total=listing.nbytes)
            facts["path"] = str(pull(name, listing, lambda count: bar.advance(task, count)))
    if as_json:
        print_json(facts)
    elif not dry_run:
        results.print(facts["path"])


def foresee(name: Name, listing: Listing) -> dict[str, Any]:
    """What memory it will need, from its headers; or why it cannot be run, before it is here."""
    from tiered.checkpoints.checkpoint import CheckpointError
    from tiered.formats import open_checkpoint
    from tiered.hub.skeleton import make_skeleton
    from tiered.planning import sizes
    from tiered.planning.needs import needs_of

    with notes.status("reading its headers"), tempfile.TemporaryDirectory() as folder:
        try:
            path = make_skeleton(name, listing, Path(folder))
            with open_checkpoint(path) as checkpoint:
                needs = needs_of(sizes.of_checkpoint(checkpoint), default_limit())
        except CheckpointError as error:
            problem = "tiered cannot run it: " + str(error).replace(f"{folder}/", "")
        except OSError as error:
            problem = f"its headers could not be read: {error}"
        else:
            notes.print(needs.verdict, style="dim")
            return {"memory": needs.as_dict()}
    notes.print(f"warning: {problem}", style="yellow", markup=False)
    return {"problem": problem}
