"""tiered run"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import notes, print_json, simulated_line, stats_line


@click.command("run")
@opt.model_argument
@click.argument("prompt", required=False)
@opt.sampling_options
@opt.option("--raw", is_flag=True, help="Continue the text as it is: no chat template.")
@opt.option("--system", metavar="TEXT", help="A system message for the chat template.")
@opt.json_option
@opt.speculate_option
@opt.routing_options
@opt.given_routing_option
@opt.engine_options
def command(
    model: Path, prompt: str | None, raw: bool, system: str | None, as_json: bool, **choices: Any
) -> None:
    """Answer PROMPT, or continue it, with MODEL; the text appears as it is generated.

    MODEL is a GGUF file, a Hugging Face folder or a store made by `tiered convert`. Without PROMPT
    (or with -) it is read from standard input. A last line on standard error tells speed, hit rate
    and bytes read; with --device sim:CARD one more tells what that card would have taken.
    """
    sampling = opt.take(choices, opt.SAMPLING_CHOICES)
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise click.UsageError("give a PROMPT, or pipe one in")
        prompt = sys.stdin.read()
    with open_engine(model, choices) as engine:
        if raw or not engine.tokenizer.chat_template:
            if system:
                raise click.UsageError("--system needs a model with a chat template, without --raw")
            pieces = engine.generate(prompt, **sampling)
        else:
            messages = [{"role": "user", "content": prompt}]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            pieces = engine.chat(messages, **sampling)
        text = []
        with notes.status("reading the prompt"):
            first = next(pieces, "")
        for piece in chain([first], pieces):
            text.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
        if as_json:
            facts = {"simulated_on": engine.timing.label} if engine.timing.label else {}
            facts |= engine.gpu_facts()
            print_json({"text": "".join(text), **engine.stats.as_dict(), **facts})
        else:
            click.echo()
            notes.print(stats_line(engine.stats), style="dim")
            if line := simulated_line(engine):
                notes.print(line, style="dim")
