"""tiered prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import options as opt
from tiered.commands.output import bytes_progress, give_json, notes, steps_progress
from tiered.memory import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from tiered.config import ModelConfig

CRITERIA = "frequency", "reap", "loss", "random"


@click.command("prune")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.option("--experts", type=click.IntRange(1), required=True, metavar="N",
            help="How many a layer keeps.")  # fmt: skip
@opt.option("--criterion", type=click.Choice(CRITERIA), default="reap", help="What makes an expert "
            "important: how often it is chosen; the mean of its weight times its output's length; "
            "the layer's error without it; or nothing (random).")  # fmt: skip
@opt.option("--text", metavar="FILE", type=click.Path(path_type=Path),
            help="The text that importance is measured on, in UTF-8.")  # fmt: skip
@opt.option("--max-tokens", type=click.IntRange(2), default=8192, help="Of the text.")
@opt.option("--seed", type=click.IntRange(0), default=0, help="For random.")
@opt.json_file_option
@opt.engine_options
def command(
    source: Path,
    destination: Path,
    experts: int,
    criterion: str,
    text: Path | None,
    max_tokens: int,
    seed: int,
    json_file: str | None,
    **choices: Any,
) -> None:
    """Write the Hugging Face checkpoint SOURCE with fewer experts to the folder DESTINATION.

    Each layer keeps its N most important experts, by what they do on a text of the kind that the
    model is meant for; routers are cut to match, everything else stays byte for byte. The result is
    a checkpoint like any other. What it lost: `tiered compare SOURCE DESTINATION --text FILE`, on
    another text.
    """
    from tiered.quality.importance import best_experts, random_scores
    from tiered.weights.prune import check_prunable, prune

    config = check_prunable(source, destination, experts)
    if criterion == "random":
        scores, share = random_scores(config, seed), None
    elif text is None:
        raise click.UsageError(f"--criterion {criterion} needs a --text")
    else:
        measured = measure(source, config, text, max_tokens, choices)
        scores = measured[criterion]
        share = kept_share(
            measured["frequency"], best_experts(scores, config.sparse_layers, experts)
        )
    kept = best_experts(scores, config.sparse_layers, experts)
    with bytes_progress() as bar:
        task = bar.add_task("writing", total=None)
        prune(source, destination, kept,
              lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
    size = sum(file.stat().st_size for file in destination.iterdir())
    report = {
        "destination": str(destination), "bytes": size, "criterion": criterion, "experts": experts,
        "of": config.num_experts, "routed_share": share,
        "kept": {str(layer): chosen for layer, chosen in kept.items()},
    }  # fmt: skip
    if give_json(report, json_file):
        routed = "" if share is None else f"; the text chose them in {share:.1%} of the cases"
        notes.print(
            f"wrote {destination}: {format_bytes(size)}, {experts} of {config.num_experts} experts "
            f"a layer by {criterion}{routed}"
        )


def measure(
    source: Path, config: ModelConfig, text: Path, max_tokens: int, choices: dict[str, Any]
) -> Any:
    """Scores by criterion: float64 [num_layers, num_experts] each."""
    if choices["device"] != "cpu":
        raise click.UsageError("importance is measured on the CPU: leave --device out")
    with notes.status(f"opening {source.name}"):
        from tiered.backend import open_backend
        from tiered.config import EngineConfig
        from tiered.engine import Engine
        from tiered.quality.importance import Meter
        from tiered.quality.importance import measure as measure_importance
        from tiered.quality.text import text_tokens

        meter: Any = Meter(open_backend(EngineConfig(**choices)), config)
        engine = Engine(source, backend=meter, **choices)
    with engine, steps_progress() as bar:
        ids = text_tokens(engine.tokenizer, text, max_tokens)
        task = bar.add_task("windows", total=None)
        return measure_importance(
            engine, ids, lambda done, total: bar.update(task, completed=done, total=total)
        )


def kept_share(counts: np.ndarray, kept: dict[int, list[int]]) -> float:
    """The share of routed tokens whose expert stays."""
    stayed = sum(float(counts[layer, experts].sum()) for layer, experts in kept.items())
    return stayed / max(float(counts.sum()), 1.0)
