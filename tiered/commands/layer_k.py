"""tiered layer-k"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.calibration import hear_text, max_tokens_option
from tiered.commands.output import give_json, results


@click.command("layer-k")
@opt.model_argument
@click.argument("table", type=click.Path(path_type=Path), callback=opt.file_to_write)
@opt.option("--average", type=click.FloatRange(1), required=True, metavar="K",
            help="Experts per token, in the mean over layers.")  # fmt: skip
@opt.text_option
@max_tokens_option
@opt.json_file_option
@opt.engine_options
def command(
    model: Path,
    table: Path,
    average: float,
    text: Path,
    max_tokens: int,
    json_file: str | None,
    **choices: Any,
) -> None:
    """Measure on a text how many experts each layer of MODEL needs, and write TABLE for --layer-k.

    A layer's error with k experts is the squared change of what it adds to the residual stream, as
    a share of it. Every layer gets one expert per token; then each further one goes where it takes
    the most from the error, until layers have K in the mean. What it costs: `tiered compare MODEL
    --b layer-k=TABLE --text FILE`, on another text.
    """
    from tiered.formats import open_checkpoint
    from tiered.layer_k import write_layer_k
    from tiered.quality.layer_errors import LayerErrors, allocate

    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    layers = config.sparse_layers
    if not layers:
        raise ValueError(f"{model} is a dense model: it has no experts")
    if not average < config.top_k:
        raise ValueError(
            f"{model} has {config.top_k} experts per token: --average must be 1 or more, and less "
            f"than that, not {average:g}"
        )
    tap = hear_text(model, lambda backend: LayerErrors(backend, config), text, max_tokens, choices)
    errors = tap.errors
    layer_k = allocate(errors, layers, average)
    about = {
        "model": model.name,
        "text": text.name,
        "tokens": tap.num_tokens,
        "average": sum(layer_k.values()) / len(layer_k),
        "errors": {str(layer): errors[layer].tolist() for layer in layers},
    }
    write_layer_k(table, layer_k, config, about)
    if give_json({"table": str(table), **about, "layer_k": layer_k}, json_file):
        results.print(f"wrote {table}: {about['average']:.3g} of {config.top_k} experts per token")
        listed = " ".join(f"{layer}:{k}" for layer, k in layer_k.items())
        results.print(f"by layer: {listed}", style="dim")
