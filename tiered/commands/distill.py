"""tiered distill"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.output import give_json, notes, show_steps, steps_progress
from tiered.memory import format_bytes


# A teacher is heard best with its own weights.
@click.command("distill", context_settings={"default_map": {"quantize": "none"}})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.text_option
@opt.option("--experts", type=click.IntRange(1), metavar="N",
            help="How many each layer shall have.")  # fmt: skip
@opt.option("--dense", is_flag=True, help="One dense feed-forward instead of experts.")
@opt.option("--ffn-size", type=click.IntRange(1), metavar="F", help="With --dense: its neurons. "
            "Default: as many as a token uses.")  # fmt: skip
@opt.option("--max-tokens", type=click.IntRange(2), default=16384, help="Of the text.")
@opt.option("--epochs", type=click.IntRange(0), default=4, help="Times that training sees the "
            "text; 0: only the best beginning is written.")  # fmt: skip
@opt.option("--batch", type=click.IntRange(1), default=128, help="Tokens of a training step.")
@opt.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=5e-4,
            help="AdamW's, at its highest.")  # fmt: skip
@opt.option(
    "--logits-steps",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="After the "
    "layers: steps that train all of them together to say what the teacher says next.",
)
@opt.option("--logits-learning-rate", type=click.FloatRange(0, min_open=True), default=1e-4,
            help="AdamW's in these.")  # fmt: skip
@opt.option("--seed", type=click.IntRange(0), default=0, help="For the order of tokens.")
@opt.option("--train-on", default="cpu", metavar="NAME",
            help="torch's device: cpu, or cuda (experimental: not yet run on one).")  # fmt: skip
@opt.plot_option("Picture of the errors: .png, .svg or .pdf.")
@opt.json_file_option
@opt.engine_options
def command(
    source: Path,
    destination: Path,
    text: Path,
    experts: int | None,
    dense: bool,
    ffn_size: int | None,
    max_tokens: int,
    plot: Path | None,
    json_file: str | None,
    epochs: int,
    batch: int,
    learning_rate: float,
    logits_steps: int,
    logits_learning_rate: float,
    seed: int,
    train_on: str,
    **choices: Any,
) -> None:
    """Train fewer experts, or one dense feed-forward, to say what those of SOURCE say.

    SOURCE is a Hugging Face checkpoint, and so is what is written to DESTINATION. On a text of the
    kind that the model is meant for, each layer is trained apart, from the best pruned or merged
    experts on, to give the same output for the same input; an eighth of the text is held out, and
    a layer that training makes no better there stays what it began as. With --logits-steps, all
    layers are then trained together by what the whole model says. A run that was stopped goes on
    when it is given again. What was lost: `tiered compare SOURCE DESTINATION --text FILE`, on
    another text.

    Needs torch: pip install 'tiered[distill]'.
    """
    if dense == (experts is not None):
        raise click.UsageError("give either --experts N or --dense")
    if ffn_size is not None and not dense:
        raise click.UsageError("--ffn-size belongs to --dense")
    if choices["device"] != "cpu":
        raise click.UsageError("the teacher runs on the CPU: leave --device out")
    from tiered.distilling.target import dense_target, experts_target

    if experts is None:
        target = dense_target(source, destination, ffn_size)
    else:
        target = experts_target(source, destination, experts)
    with notes.status("loading torch"):
        distilling = import_distilling(train_on)
    from tiered.quality.text import text_tokens
    from tiered.text.tokenizer import load_tokenizer

    ids = text_tokens(load_tokenizer(source), text, max_tokens)
    recipe = distilling.Recipe(
        epochs, batch, learning_rate, seed, train_on, logits_steps, logits_learning_rate
    )
    order = distilling.Order(source, destination, target, ids, recipe, choices)
    with steps_progress() as bar:
        report = distilling.distill(order, show_steps(bar))
    size = sum(file.stat().st_size for file in destination.iterdir())
    about = {"destination": str(destination), "bytes": size, "experts": experts,
             "ffn_size": target.student.ffn_size if dense else None}  # fmt: skip
    report = {**about, "settings": recipe._asdict(), **report}
    if plot is not None:
        from tiered.measuring.plot import plot_distillation

        plot_distillation(report, plot, source.name)
        notes.print(f"wrote {plot}", style="dim")
    if give_json(report, json_file):
        notes.print(summary(report, destination))


def import_distilling(device: str) -> Any:
    """The module that needs torch. UsageError if it is missing, or the device is."""
    try:
        import torch

        from tiered.distilling import distill
    except ImportError as error:
        raise click.UsageError(f"{error}; pip install 'tiered[distill]' brings it") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--train-on {device}: {reason}") from None
    return distill


def summary(report: dict[str, Any], destination: Path) -> str:
    layers = report["layers"].values()
    before = fmean(layer["beginnings"][layer["beginning"]] for layer in layers)
    after = fmean(layer["error"] for layer in layers)
    if report["experts"] is None:
        what = f"a feed-forward of {report['ffn_size']} neurons"
    else:
        what = f"{report['experts']} experts"
    text = (
        f"wrote {destination}: {format_bytes(report['bytes'])}, {what} a layer; held-out error of "
        f"their outputs {before:.2%} before training, {after:.2%} after"
    )
    if logits := report["logits"]:
        text += f"; then KL {logits['before']:.4f} before training by logits, "
        text += f"{logits['after']:.4f} after"
    return text
