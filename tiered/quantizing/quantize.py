"""A checkpoint with fewer bits: calibrate, choose formats, round layer by layer, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cpu_kernels.formats import FORMATS
from tiered.checkpoints.checkpoint import Checkpoint
from tiered.config import EngineConfig, ModelConfig
from tiered.formats import open_checkpoint
from tiered.quantizing.allocation import Option, Unit, allocate
from tiered.quantizing.gguf_file import check_gguf, write_gguf
from tiered.quantizing.grids import GRIDS, fitting_formats
from tiered.quantizing.layer import METHODS, round_layer, round_layer_plainly
from tiered.quantizing.rewritten import ExpertFiles, Formats, Rewritten, expert_bytes
from tiered.quantizing.sensitivity import Sensitivity, measure_options
from tiered.quantizing.unfinished import Unfinished
from tiered.quantizing.walk import Walk
from tiered.version import __version__
from tiered.weights.convert import check_free, check_space, write_store
from tiered.weights.resume import stamps, token_digest

FEWEST_PER_EXPERT = 16  # tokens that the text must have for each expert, on average

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class Recipe:
    """How to quantize.

    All experts get `format`; or, with `bits`, each layer's gate and up, and its down, one of
    `formats` (empty: all that fit), so that a weight has so many bits on average, scales included;
    or, with `mix_by` "expert", those of each expert.
    `fewest`: an expert that the text chose for fewer tokens is calibrated with others', too.
    """

    method: str = "gptq"
    format: str = "q4_0"
    bits: float | None = None
    formats: tuple[str, ...] = ()
    mix_by: str = "layer"
    fewest: int = 128
    window: int = 512  # tokens that are computed together
    sensitivity_tokens: int = 1024
    threads: int = 1
    isa: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "rtn"):
            raise ValueError(f"method must be {', '.join(METHODS)} or rtn, not {self.method!r}")
        for name in (self.format, *self.formats):
            if name not in GRIDS:
                raise ValueError(f"experts can become {', '.join(GRIDS)}, but not {name!r}")
        if self.mix_by not in ("layer", "expert"):
            raise ValueError(f"mix_by must be layer or expert, not {self.mix_by!r}")
        if self.mix_by == "expert" and self.bits is None:
            raise ValueError("a mix by expert needs a size to be chosen for: give --bits, too")

    @property
    def uses_text(self) -> bool:
        return self.method != "rtn" or self.bits is not None

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(threads=self.threads, isa=self.isa, kv_dtype="f32")


@dataclass
class Result:
    """What was done."""

    formats: dict[int, list[Formats]]  # of each expert, by layer
    bits: float  # of an expert's weight, on average
    nbytes: int = 0  # of the files written
    few: int = 0  # experts that the text chose for fewer than `fewest` tokens
    options: dict[Unit, list[Option]] = field(default_factory=dict)
    shares: dict[Unit, list[float]] = field(default_factory=dict)  # see Sensitivity


def quantize(
    source: Path,
    destination: Path,
    recipe: Recipe,
    ids: Sequence[int] = (),
    progress: Progress | None = None,
) -> Result:
    """Write the model at `source` with experts of fewer bits: a GGUF file if `destination` ends in
    .gguf, else a store.

    Large float matrices of the rest become q8_0; router, norms and embeddings stay. `ids` are the
    tokens of a calibration text. Raises FileExistsError if `destination` exists, ValueError for
    what cannot be done, OSError if the disk is too small. What was interrupted leaves a hidden
    folder that does not open, and the same call goes on from the last layer that was done.
    """
    report = progress or (lambda what, done, total: None)
    check_free(destination)
    with open_checkpoint(source) as original:
        config = original.config
        check_quantizable(original, recipe, len(ids))
        as_gguf = destination.suffix == ".gguf"
        if as_gguf:
            check_gguf(original)
            check_formats_of_gguf(recipe)
        candidates = candidate_formats(original, recipe, as_gguf)
        size = min(recipe.window, config.context_length)
        windows = [ids[i : i + size] for i in range(0, len(ids), size)]
        # The experts are written twice: next to the result, and into it.
        check_space(destination, 2 * most_bytes(config, recipe))
        unfinished = Unfinished(destination, facts(original, recipe, ids))
        with Rewritten(original, unfinished.folder) as checkpoint:
            result = choose_formats(original, recipe, candidates, windows, unfinished, report)
            round_all(checkpoint, recipe, windows, result, unfinished, report)

            def written(done: int, total: int) -> None:
                report("writing", done, total)

            if as_gguf:
                write_gguf(checkpoint, destination, unfinished.folder, written)
                result.nbytes = destination.stat().st_size
            else:
                write_store(checkpoint, destination, "int4", written)
                files = (file for file in destination.rglob("*") if file.is_file())
                result.nbytes = sum(file.stat().st_size for file in files)
        unfinished.remove()
    return result


def check_quantizable(checkpoint: Checkpoint, recipe: Recipe, num_tokens: int) -> None:
    """ValueError says in one line what is wrong."""
    config, path = checkpoint.config, checkpoint.path
    if not config.sparse_layers:
        raise ValueError(f"{path} is a dense model: it has no experts")
    sizes = config.hidden_size, config.expert_size
    for name in (recipe.format,) if recipe.bits is None else recipe.formats:
        if any(size % FORMATS[name].block_size for size in sizes):
            raise ValueError(
                f"{path}: rows of {' and '.join(map(str, sizes))} values are no whole number of "
                f"{name} blocks ({FORMATS[name].block_size} values each)"
            )
    if not recipe.uses_text:
        return
    needed = FEWEST_PER_EXPERT * config.num_experts // config.top_k
    if num_tokens < needed:
        raise ValueError(
            f"the calibration text has {num_tokens} tokens; for {config.num_experts} experts, "
            f"{config.top_k} per token, at least {needed} are needed"
        )


def check_formats_of_gguf(recipe: Recipe) -> None:
    """ValueError for a format that is not ggml's, or for several in a layer."""
    if recipe.mix_by == "expert":
        raise ValueError(
            "GGUF has all experts of a layer in one tensor, of one format: write a store instead "
            "(a destination without .gguf), or use --mix-by layer"
        )
    for name in (recipe.format,) if recipe.bits is None else recipe.formats:
        if not FORMATS[name].is_ggmls:
            raise ValueError(
                f"GGUF has no {name}; write a store instead (a destination without .gguf), or "
                "choose another format"
            )


def choose_formats(
    checkpoint: Checkpoint,
    recipe: Recipe,
    candidates: Sequence[str],
    windows: Sequence[Sequence[int]],
    unfinished: Unfinished,
    report: Progress,
) -> Result:
    """Of gate, up and down of each expert."""
    config, saved = checkpoint.config, unfinished.state.get("sensitivity")
    if recipe.bits is None:
        alike: Formats = (recipe.format,) * 3
        chosen = {layer: [alike] * config.num_experts for layer in config.sparse_layers}
        return Result(chosen, average_bits(config, chosen))
    if saved is None:
        reference = min(candidates, key=lambda name: abs(FORMATS[name].bits - recipe.bits))
        sensitivity = measure_options(
            checkpoint, windows[: max(1, recipe.sensitivity_tokens // recipe.window)], candidates,
            reference, recipe.fewest, recipe.engine,
            lambda done, total: report("sensitivity", done, total),
        )  # fmt: skip
        unfinished.save(sensitivity=sensitivity.as_json())
    else:
        sensitivity = Sensitivity.from_json(saved)
    by_expert = recipe.mix_by == "expert"
    options = sensitivity.by_expert() if by_expert else sensitivity.options
    names = allocate(options, budget(config, recipe.bits))

    def formats(layer: int, expert: int) -> Formats:
        whose = expert if by_expert else None
        gate_up = names[Unit(layer, "gate_up", whose)]
        return gate_up, gate_up, names[Unit(layer, "down", whose)]

    chosen = {
        layer: [formats(layer, expert) for expert in range(config.num_experts)]
        for layer in config.sparse_layers
    }
    return Result(chosen, average_bits(config, chosen), 0, 0, *sensitivity)


def candidate_formats(checkpoint: Checkpoint, recipe: Recipe, as_gguf: bool) -> list[str]:
    """The formats to choose from, if bits are given. ValueError if they cannot be reached."""
    config = checkpoint.config
    if recipe.bits is None:
        return []
    both = [
        {format.name for format in fitting_formats(size)}
        for size in (config.hidden_size, config.expert_size)
    ]
    usable = [name for name in GRIDS if FORMATS[name].is_ggmls or not as_gguf]
    names = [name for name in recipe.formats or usable if name in both[0] & both[1]]
    least = min(FORMATS[name].bits for name in names)
    most = max(FORMATS[name].bits for name in names)
    if not least <= recipe.bits <= most:
        raise ValueError(
            f"{checkpoint.path}: --bits {recipe.bits:g} cannot be reached: the formats "
            f"{', '.join(names)} have {least:g} to {most:g} bits per weight"
        )
    return names


def num_weights(config: ModelConfig) -> int:
    """Of all experts."""
    each = 3 * config.hidden_size * config.expert_size
    return each * config.num_experts * len(config.sparse_layers)


def budget(config: ModelConfig, bits: float) -> int:
    return int(num_weights(config) * bits / 8)


def most_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """That all experts together may take."""
    if recipe.bits is not None:
        return budget(config, recipe.bits)
    num_experts = config.num_experts * len(config.sparse_layers)
    return num_experts * expert_bytes(config, (recipe.format,) * 3)


def average_bits(config: ModelConfig, chosen: dict[int, list[Formats]]) -> float:
    """Of a weight of experts."""
    counts = Counter(chain.from_iterable(chosen.values()))
    nbytes = sum(count * expert_bytes(config, formats) for formats, count in counts.items())
    return 8 * nbytes / num_weights(config)


def facts(checkpoint: Checkpoint, recipe: Recipe, ids: Sequence[int]) -> dict[str, Any]:
    """All that the result depends on."""
    choices = {name: value for name, value in asdict(recipe).items() if name != "threads"}
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    return {
        "version": __version__, "source": stamps(files), **choices, "text": token_digest(ids)
    }  # fmt: skip


def round_all(
    checkpoint: Rewritten,
    recipe: Recipe,
    windows: Sequence[Sequence[int]],
    result: Result,
    unfinished: Unfinished,
    report: Progress,
) -> None:
    """Round layer by layer; each is calibrated with what the rounded layers before it say."""
    config, walk, states = checkpoint.config, None, []
    done, result.few = unfinished.state["layers"], unfinished.state["few"]
    for layer in config.sparse_layers:
        if layer < done:
            ExpertFiles(checkpoint, layer, result.formats[layer], done=True)
    unfinished.load_rewritten(checkpoint)
    if recipe.method != "rtn" and done < config.num_layers:
        walk = Walk(checkpoint, windows, recipe.engine)
        states = unfinished.load_states(list(map(len, windows))) if done else walk.start()
    try:
        for layer in range(done, config.num_layers):
            report("rounding", layer, config.num_layers)
            sparse = config.is_sparse(layer)
            files = ExpertFiles(checkpoint, layer, result.formats[layer]) if sparse else None
            if walk is None:
                if files is not None:
                    round_layer_plainly(checkpoint, layer, files, recipe.threads)
                unfinished.save_layer(layer + 1, 0, [], checkpoint)
                continue
            walk.open(layer, files.layouts if files else None)
            walk.attend(layer, states)
            if files is not None:
                method = METHODS[recipe.method]
                counts = round_layer(
                    checkpoint, layer, files, walk.given(layer, states), method, recipe.fewest,
                    recipe.threads,
                )  # fmt: skip
                result.few += int((counts < recipe.fewest).sum())
                if method.scaled:  # its norm and its router are others now
                    walk.open(layer, files.layouts)
                walk.run(layer, states, files.addresses)
            walk.leave(layer)
            unfinished.save_layer(layer + 1, result.few, states, checkpoint)
        report("rounding", config.num_layers, config.num_layers)
    finally:
        if walk is not None:
            walk.close()
