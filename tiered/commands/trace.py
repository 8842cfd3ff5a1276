"""tiered trace"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import notes, print_json, stats_line


@click.command("trace")
@opt.model_argument
@click.argument("prompt")
@opt.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default="routing.trace",
    callback=opt.file_to_write,
    help="The file to write.",
)
@opt.option("--max-new-tokens", "-n", type=click.IntRange(1), default=128, help="Stop after these.")
@opt.json_option
@opt.routing_options_short
@opt.engine_options
def command(
    model: Path, prompt: str, output: Path, max_new_tokens: int, as_json: bool, **choices: Any
) -> None:
    """Record which experts MODEL uses while it continues PROMPT, for `tiered replay` and `sweep`.

    The file's format is described in tiered/tracing/trace.py. Continues past an end-of-text token,
    so that traces have the length that was asked for.
    """
    with open_engine(model, choices) as engine:
        ids = engine.tokenizer.encode(prompt)
        with engine.record(output), notes.status("generating"):
            tokens = list(engine.generate_tokens(ids, max_new_tokens))
        stats = engine.stats
    if as_json:
        print_json({"trace": str(output), "tokens": len(tokens), **stats.as_dict()})
    else:
        notes.print(f"wrote {output}: {output.stat().st_size} bytes")
        notes.print(stats_line(stats), style="dim")
