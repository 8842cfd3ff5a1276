"""tiered chat"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import notes, stats_line

HELP = "/new starts over · /stats tells what happened so far · /exit or Ctrl-D ends"


@click.command("chat")
@opt.model_argument
@opt.sampling_options
@opt.option("--system", metavar="TEXT", help="A system message.")
@opt.speculate_option
@opt.routing_options
@opt.engine_options
def command(model: Path, system: str | None, **choices: Any) -> None:
    """Talk with MODEL. Each turn computes only what is new since the last."""
    sampling = opt.take(choices, opt.SAMPLING_CHOICES)
    opening = [{"role": "system", "content": system}] if system else []
    with open_engine(model, choices) as engine:
        notes.print(HELP, style="dim")
        messages, sequence = list(opening), engine.open_sequence()
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/new":
                messages = list(opening)
                notes.print("a new conversation", style="dim")
            elif line == "/stats":
                notes.print(stats_line(engine.stats), style="dim")
            elif line.startswith("/"):
                notes.print(HELP, style="dim")
            elif line:
                before, said = engine.stats, []
                messages.append({"role": "user", "content": line})
                try:
                    for piece in engine.chat(messages, sequence=sequence, **sampling):
                        said.append(piece)
                        click.echo(piece, nl=False)
                except KeyboardInterrupt:
                    pass  # stop this answer, not the conversation
                click.echo()
                messages.append({"role": "assistant", "content": "".join(said)})
                notes.print(stats_line(engine.stats - before), style="dim")
