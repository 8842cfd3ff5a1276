"""tiered prune"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import options as opt
from tiered.commands.calibration import hear_text, max_tokens_option
from tiered.commands.output import bytes_progress, give_json, notes, steps_progress
from tiered.memory import format_bytes

if TYPE_CHECKING:
    import numpy as np

    from tiered.config import ModelConfig
    from tiered.quality.importance import Meter
    from tiered.quality.likeness import LikenessMeter
    from tiered.weights.merge import Groups

NAMES = "frequency", "reap", "loss", "random"  # of criteria


@click.command("prune")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.option("--experts", type=click.IntRange(1), required=True, metavar="N",
            help="How many a layer keeps.")  # fmt: skip
@opt.option("--criterion", type=click.Choice(NAMES), default="reap", help="What makes an expert "
            "important: how often it is chosen; the mean of its weight times its output's length; "
            "the layer's error without it; or nothing (random).")  # fmt: skip
@opt.option("--merge", is_flag=True, help="Do not drop the other experts: each "
            "becomes a part of the one that says what is nearest to what it says.")  # fmt: skip
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
    merge: bool,
    text: Path | None,
    max_tokens: int,
    seed: int,
    json_file: str | None,
    **choices: Any,
) -> None:
    """Write the Hugging Face checkpoint SOURCE with fewer experts to the folder DESTINATION.

    Each layer keeps its N most important experts, by what they do on a text of the kind that the
    model is meant for; routers are cut to match, everything else stays byte for byte. With --merge,
    an expert that stays becomes the mean of itself and of those that went, neuron by neuron, each
    counted as often as it was chosen. The result is a checkpoint like any other. What it lost:
    `tiered compare SOURCE DESTINATION --text FILE`, on another text.
    """
    report = write_pruned(
        source, destination, experts, criterion, merge, text, max_tokens, seed, choices
    )
    if give_json(report, json_file):
        share = report["routed_share"]
        routed = "" if share is None else f"; the text chose them in {share:.1%} of the cases"
        notes.print(
            f"wrote {destination}: {format_bytes(report['bytes'])}, {experts} of {report['of']} "
            f"experts a layer by {criterion}{', the others merged into them' if merge else ''}"
            f"{routed}"
        )


def write_pruned(
    source: Path,
    destination: Path,
    experts: int,
    criterion: str,
    merge: bool,
    text: Path | None,
    max_tokens: int,
    seed: int,
    choices: dict[str, Any],
) -> dict[str, Any]:
    """Write `source` with fewer experts to `destination`, with bars for what takes long."""
    from tiered.quality.importance import CRITERIA, best_experts, random_scores
    from tiered.quality.likeness import LikenessMeter
    from tiered.weights.prune import check_prunable, prune

    config = check_prunable(source, destination, experts)
    if text is None and (merge or criterion != "random"):
        what = "--merge" if merge else f"--criterion {criterion}"
        raise click.UsageError(f"{what} needs a --text")
    meter = None if text is None else heard(source, config, text, merge, max_tokens, choices)
    if criterion == "random" or meter is None:
        scores = random_scores(config, seed)
    else:
        scores = CRITERIA[criterion](meter)
    kept = best_experts(scores, config.sparse_layers, experts)
    groups = join(source, meter, kept) if isinstance(meter, LikenessMeter) else None
    with bytes_progress() as bar:
        task = bar.add_task("writing", total=None)
        prune(
            source, destination, kept,
            lambda done, total: bar.update(task, completed=done, total=total), groups,
        )  # fmt: skip
    size = sum(file.stat().st_size for file in destination.iterdir())
    return {
        "destination": str(destination), "bytes": size, "criterion": criterion, "experts": experts,
        "of": config.num_experts, "merged": merge,
        "routed_share": None if meter is None else kept_share(meter.count, kept),
        "kept": {str(layer): chosen for layer, chosen in kept.items()},
        **({} if groups is None else {"groups": numbers(groups)}),
    }  # fmt: skip


def heard(
    source: Path,
    config: ModelConfig,
    text: Path,
    merge: bool,
    max_tokens: int,
    choices: dict[str, Any],
) -> Meter:
    """What experts do on a text; to merge them, also how alike they are."""
    from tiered.quality.importance import Meter
    from tiered.quality.likeness import LikenessMeter, tokens_at_once

    kind = LikenessMeter if merge else Meter
    if merge:
        choices = {**choices, "prefill_chunk": tokens_at_once(config)}
    return hear_text(source, lambda back: kind(back, config), text, max_tokens, choices)


def join(source: Path, meter: LikenessMeter, kept: dict[int, list[int]]) -> Groups:
    """Which expert becomes a part of which, and in what order its neurons."""
    from tiered.formats import open_checkpoint
    from tiered.quality.likeness import nearest
    from tiered.weights.merge import align

    groups = nearest(meter.distances, kept)
    with open_checkpoint(source) as checkpoint, steps_progress() as bar:
        task = bar.add_task("aligning experts", total=None)
        return align(checkpoint, groups, meter.count,
                     lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip


def numbers(groups: Groups) -> dict[str, dict[str, list[int]]]:
    """By layer and by expert that stays: those that became parts of it."""
    return {
        str(layer): {
            str(kept): [member.expert for member in members[1:]]
            for kept, members in experts_of.items()
        }
        for layer, experts_of in groups.items()
    }


def kept_share(counts: np.ndarray, kept: dict[int, list[int]]) -> float:
    """The share of routed tokens whose expert stays."""
    stayed = sum(float(counts[layer, experts].sum()) for layer, experts in kept.items())
    return stayed / max(float(counts.sum()), 1.0)
