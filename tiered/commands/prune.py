"""tiered prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import options as opt
from tiered.commands.calibration import hear_text, max_tokens_option
from tiered.commands.output import bytes_progress, give_json, notes
from tiered.memory import format_bytes

if TYPE_CHECKING:
    import numpy as np

NAMES = "frequency", "reap", "loss", "random"  # of criteria


@click.command("prune")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.option("--experts", type=click.IntRange(1), required=True, metavar="N",
            help="How many a layer keeps.")  # fmt: skip
@opt.option("--criterion", type=click.Choice(NAMES), default="reap", help="What makes an expert "
            "important: how often it is chosen; the mean of its weight times its output's length; "
            "the layer's error without it; or nothing (random).")  # fmt: skip
@opt.option("--text", metavar="FILE", type=click.Path(path_type=Path),
            help="The text that importance is measured on, in UTF-8.")  # fmt: skip
@max_tokens_option
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
    from tiered.quality.importance import CRITERIA, Meter, best_experts, random_scores
    from tiered.weights.prune import check_prunable, prune

    config = check_prunable(source, destination, experts)
    if criterion == "random":
        scores, share = random_scores(config, seed), None
    elif text is None:
        raise click.UsageError(f"--criterion {criterion} needs a --text")
    else:
        meter = hear_text(source, lambda back: Meter(back, config), text, max_tokens, choices)
        scores = CRITERIA[criterion](meter)
        share = kept_share(meter.count, best_experts(scores, config.sparse_layers, experts))
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


def kept_share(counts: np.ndarray, kept: dict[int, list[int]]) -> float:
    """The share of routed tokens whose expert stays."""
    stayed = sum(float(counts[layer, experts].sum()) for layer, experts in kept.items())
    return stayed / max(float(counts.sum()), 1.0)
