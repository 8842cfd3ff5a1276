"""tiered ppl"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import give_json, results, rules_line, rules_report, steps_progress
from tiered.version import __version__

if TYPE_CHECKING:
    from tiered.engine import Engine
    from tiered.quality.perplexity import Perplexity


@click.command("ppl")
@opt.model_argument
@opt.text_option
@opt.text_window_options
@opt.option("--record", metavar="TRACE", type=click.Path(path_type=Path),
            callback=opt.file_to_write,
            help="Write the routing to a file, for --routing and `tiered replay`.")  # fmt: skip
@opt.json_file_option
@opt.routing_options_short
@opt.given_routing_option
@opt.engine_options
def command(
    model: Path,
    text: Path,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    record: Path | None,
    json_file: str | None,
    **choices: Any,
) -> None:
    """Measure MODEL's perplexity on a text: how well it predicts each token from those before it.

    The text is cut into windows; each begins --stride tokens after the one before, and only tokens
    that no earlier window held are predicted, so that each counts once. The interval is a
    confidence of 95 %, by a block bootstrap over the text's tokens. Perplexities of models with
    different tokenizers cannot be compared.
    """
    choices["context"] = choices["context"] or window
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(model, choices))
        if record is not None:
            stack.enter_context(engine.record(record))
        found = measure(engine, text, window, stride, max_tokens)
        stats = engine.stats
    settings = {name: value for name, value in choices.items() if value is not None}
    about = {"tiered": __version__, "model": str(model), "text": str(text), "settings": settings}
    report = {**about, **found.as_dict(), **rules_report(stats)}
    if give_json(report, json_file):
        low, high = report["perplexity_interval"]
        results.print(
            f"perplexity {found.value:.4f} (95 %: {low:.4f} to {high:.4f}) "
            f"of {len(found.losses)} tokens, {found.seconds:.1f} s"
        )
        results.print(
            f"windows of {found.size} tokens, stride {found.stride}; mean loss "
            f"{found.mean_loss:.5f} nats a token",
            style="dim",
        )
        if rules := rules_line(stats):
            results.print(rules, style="dim")


def measure(
    engine: Engine, text: Path, window: int | None, stride: int | None, max_tokens: int | None
) -> Perplexity:
    from tiered.quality.perplexity import measure_perplexity
    from tiered.quality.text import text_tokens

    check_window(engine, window)
    ids = text_tokens(engine.tokenizer, text, max_tokens)
    with steps_progress() as bar:
        task = bar.add_task("windows", total=None)
        return measure_perplexity(
            engine,
            ids,
            window,
            stride,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def check_window(engine: Engine, window: int | None) -> None:
    """ValueError if a window is larger than what the engine keeps memory for."""
    if window is not None and window > engine.context:
        raise ValueError(
            f"a window of {window} tokens is more than the context of {engine.context}; give a "
            f"smaller --window (this model: {engine.config.context_length} at most)"
        )
