"""tiered quantize"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiered.commands import lists
from tiered.commands import options as opt
from tiered.commands.output import give_json, notes, show_steps, steps_progress
from tiered.memory import format_bytes

if TYPE_CHECKING:
    from tiered.quantizing.quantize import Recipe, Result

METHODS = "gptq", "awq", "awq+gptq", "weighted", "rtn"


def names(_context: Any, _parameter: Any, value: str | None) -> tuple[str, ...]:
    return tuple(lists.split(value.lower())) if value else ()


def lower(_context: Any, _parameter: Any, value: str) -> str:
    return value.strip().lower()


@click.command("quantize")  # fmt: skip
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@opt.option("--method", type=click.Choice(METHODS), default="gptq",
            help="gptq: later columns make good for what earlier ones lost; awq: columns with "
            "large inputs are stored larger; awq+gptq: both, one after the other; weighted: "
            "scales of least error, weighed by inputs; rtn: the same without a text.")  # fmt: skip
@opt.option("--format", metavar="NAME", default="q4_0", callback=lower,
            help="What experts become: mxfp4, nf4, q4_0, iq4_nl, q4_1, q5_0, q5_1, q8_0; with rows "
            "of whole 128 values, int4_g128; of whole 256, q2_k, q3_k, q4_k, q5_k, q6_k. GGUF has "
            "neither nf4 nor int4_g128.")  # fmt: skip
@opt.option("--bits", type=click.FloatRange(1, 16), metavar="X",
            help="Instead: a format for each layer's gate and up, and for its down, chosen by "
            "measured sensitivity, so that an expert's weight has X bits on average.")  # fmt: skip
@opt.option("--formats", metavar="NAME,...", callback=names,
            help="Which --bits may choose from. Default: all that fit.")  # fmt: skip
@opt.option("--mix-by", type=click.Choice(["layer", "expert"]), default="layer",
            help="With --bits, whether a layer's experts share what is chosen, or each has its "
            "own; GGUF has no mix by expert.")  # fmt: skip
@opt.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="The calibration text, "
            "in UTF-8: of the kind that the model is meant for.")  # fmt: skip
@opt.option("--max-tokens", type=click.IntRange(2), default=32768, help="Of the text.")  # fmt: skip
@opt.option("--fewest", type=click.IntRange(0), default=128, metavar="N",
            help="Experts that the text chose for fewer tokens are calibrated with other tokens "
            "of the layer, too.")  # fmt: skip
@opt.option("--window", type=click.IntRange(2), default=512, help="Tokens read together.")
@opt.option("--threads", type=click.IntRange(1), help="Default: the cores there are.")
@opt.json_file_option
def command(
    source: Path,
    destination: Path,
    text: Path | None,
    max_tokens: int,
    json_file: str | None,
    **choices: Any,
) -> None:
    """Write the model SOURCE with experts of fewer bits: as a GGUF file, for llama.cpp too, if
    DESTINATION ends in .gguf, else as a store.

    Other large float matrices get 8 bits; router, norms and embeddings stay. Each layer is
    calibrated with what the quantized layers before it make of the text. A run that was stopped
    goes on when it is given again. What it costs:
    `tiered compare SOURCE DESTINATION --a quantize=none --text FILE`, on another text.
    """
    from tiered.backend import default_threads
    from tiered.quantizing.quantize import Recipe, quantize
    from tiered.weights.convert import check_free

    choices["threads"] = choices["threads"] or default_threads()
    recipe = Recipe(**choices)
    check_free(destination)
    if recipe.uses_text and text is None:
        why = f"--method {recipe.method}" if recipe.method != "rtn" else "--bits"
        raise click.UsageError(f"{why} needs a --text")
    ids = read_ids(source, text, max_tokens) if recipe.uses_text and text is not None else []
    with steps_progress() as bar:
        result = quantize(source, destination, recipe, ids, show_steps(bar))
    if give_json(report(destination, recipe, result, len(ids)), json_file):
        notes.print(summary(destination, recipe, result))


def read_ids(source: Path, text: Path, max_tokens: int) -> list[int]:
    from tiered.formats import open_checkpoint
    from tiered.quality.text import text_tokens
    from tiered.text.tokenizer import load_tokenizer

    with open_checkpoint(source) as checkpoint:
        return text_tokens(load_tokenizer(checkpoint.tokenizer_source), text, max_tokens)


def report(destination: Path, recipe: Recipe, result: Result, num_tokens: int) -> dict[str, Any]:
    return {
        "destination": str(destination), "bytes": result.nbytes, "method": recipe.method,
        "bits": result.bits, "tokens": num_tokens, "fewest": recipe.fewest, "few": result.few,
        "formats": {
            str(layer): formats if len(set(formats)) > 1 else formats[0]
            for layer, formats in result.formats.items()
        },
        "sensitivity": [
            {"layer": unit.layer, "part": unit.part, **option._asdict()}
            for unit, options in result.options.items()
            for option in options
        ],
        "shares": [
            {"layer": unit.layer, "part": unit.part, "experts": shares}
            for unit, shares in result.shares.items()
        ],
    }  # fmt: skip


def summary(destination: Path, recipe: Recipe, result: Result) -> str:
    of_experts = chain.from_iterable(result.formats.values())
    kinds = Counter(chain.from_iterable(of_experts))  # of matrices
    shares = ", ".join(
        f"{count / kinds.total():.0%} {name}" for name, count in sorted(kinds.items())
    )
    few = ""
    if result.few:
        few = (
            f"; {result.few} experts saw fewer than {recipe.fewest} tokens and were calibrated "
            "with others' too: a longer text would be better"
        )
    return (
        f"wrote {destination}: {format_bytes(result.nbytes)}, {result.bits:.3g} bits per weight of "
        f"experts ({shares}), by {recipe.method}{few}"
    )
