"""tiered look-ahead"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import notes, print_json, results

if TYPE_CHECKING:
    from tiered.prefetch import Accuracy
    from tiered.tracing.look_ahead import LookAheadWatch, Predictor


@click.command("look-ahead")
@opt.model_argument
@click.argument("prompt")
@opt.option("--max-new-tokens", "-n", type=click.IntRange(2), default=64, help="Stop after these.")
@opt.option("--layers", type=click.IntRange(1, 8), default=3, help="Layers ahead, at most.")
@opt.json_option
@opt.engine_options
def command(
    model: Path, prompt: str, max_new_tokens: int, layers: int, as_json: bool, **choices: Any
) -> None:
    """Tell how well MODEL's experts are foreseen while it continues PROMPT, layer by layer.

    A later layer's router is asked 1, 2, ... layers too early. Beside it: 0 layers, which must be
    right always; the experts of the token before; those used most so far. Experts stay where they
    are: what reading them ahead is worth depends on the disk, and is measured while running.
    """
    from tiered.tracing.look_ahead import LookAheadWatch

    with open_engine(model, {**choices, "look_ahead": 0}) as engine:
        if engine.store is None:
            raise ValueError(f"{model} is a dense model: there is nothing to foresee")
        watch = LookAheadWatch(engine.config.num_layers, engine.config.num_experts, layers)
        engine.decoder.look_ahead = watch
        ids = engine.tokenizer.encode(prompt)
        with notes.status("generating"):
            num_tokens = len(list(engine.generate_tokens(ids, max_new_tokens)))
    if as_json:
        print_json({"model": model.name, "tokens": num_tokens, **_facts(watch)})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer")
    for predictor in watch.predictors:
        ahead = isinstance(predictor, int)
        table.add_column(f"{predictor} ahead" if ahead else str(predictor), justify="right")
    for layer in watch.layers:
        scores = (watch.scores.get((layer, predictor)) for predictor in watch.predictors)
        table.add_row(str(layer), *map(_cell, scores))
    table.add_row("all", *(_cell(watch.total(of)) for of in watch.predictors), style="bold")
    results.print(table)
    note = f"% of experts / of tokens with all their experts, {num_tokens} tokens"
    results.print(note, style="dim")


def _cell(score: Accuracy | None) -> str:
    if score is None or not score.tokens:
        return ""
    return f"{100 * score.slot_overlap:.0f} / {100 * score.whole / score.tokens:.0f}"


def _facts(watch: LookAheadWatch) -> dict[str, Any]:
    """By predictor: its shares in all layers, and in each."""
    return {"predictors": {str(of): _shares(watch, of) for of in watch.predictors}}


def _shares(watch: LookAheadWatch, predictor: Predictor) -> dict[str, Any]:
    layers = {
        str(layer): _pair(score)
        for (layer, of), score in sorted(watch.scores.items(), key=lambda item: item[0][0])
        if of == predictor
    }
    return {**_pair(watch.total(predictor)), "layers": layers}


def _pair(score: Accuracy) -> dict[str, float]:
    return {"slot_overlap": score.slot_overlap, "whole": score.whole / max(1, score.tokens)}
