"""Options that several commands share. Each has an environment twin: --ram and TIERED_RAM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from tiered import policies
from tiered.config import DEFAULT_POLICY, QUANTIZATIONS, SPECULATIONS

Command = TypeVar("Command", bound=Callable[..., Any])


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """click.option with the environment twin, shown in the help text."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    twin = "TIERED_" + long[2:].upper().replace("-", "_")
    settings.setdefault("show_default", settings.get("default") is not None)
    return click.option(*names, envvar=twin, **settings)


def several(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for a group of options, shown in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(options):
            command = decorator(command)
        return command

    return decorate


def file_to_write(_context: Any, _parameter: Any, value: Any) -> Any:
    """A callback: whether a file can be written is known before a long run, not after it."""
    if value is not None and not (folder := Path(value).parent).is_dir():
        raise click.BadParameter(f"{value}: there is no folder {folder}")
    if value is not None and Path(value).is_dir():
        raise click.BadParameter(f"{value} is a folder")
    return value


def picture(context: Any, parameter: Any, value: Path | None) -> Path | None:
    """A callback for --plot: also whether it can be drawn."""
    if value is not None:
        from tiered.measuring.plot import check_plot

        check_plot(value)
    return file_to_write(context, parameter, value)  # type: ignore[no-any-return]


def plot_option(text: str = "Picture: .png, .svg or .pdf.") -> Callable[[Command], Command]:
    return option("--plot", type=click.Path(path_type=Path), callback=picture, help=text)


model_argument = click.argument("model", type=click.Path(path_type=Path))

json_option = option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")

prefill_chunk_option = option(
    "--prefill-chunk", type=click.IntRange(1), default=512,
    help="Tokens of a prompt computed at once. Fewer: others go on sooner in between; more: the "
    "prompt is done sooner.",
)  # fmt: skip

json_file_option = option(
    "--json", "json_file", metavar="[FILE]", is_flag=False, flag_value="-", default=None,
    callback=file_to_write,
    help="Write the result as a JSON object, too; without FILE: print it instead.",
)  # fmt: skip

text_option = option(
    "--text", metavar="FILE", type=click.Path(path_type=Path), required=True,
    help="A text in UTF-8.",
)  # fmt: skip

window_options = several(
    option("--window", type=click.IntRange(2), help="Tokens computed together. "
           "Default: the context."),
    option("--stride", type=click.IntRange(1), help="Tokens from one window to the next. "
           "Default: half a window."),
)  # fmt: skip

text_window_options = several(
    window_options,
    option("--max-tokens", type=click.IntRange(2), help="Only so many tokens of the text."),
)

other_engine_options = several(
    option("--ram", metavar="SIZE", help="All the memory the process may hold, as 8G. "
           "Default: what is free, less a margin."),
    option("--threads", type=click.IntRange(1), help="Threads that compute. Default: all cores."),
    option("--policy", default=DEFAULT_POLICY, metavar="NAME",
           help=f"Eviction policy: {', '.join(policies.online())}; or FILE.py:CLASS."),
    option("--look-ahead", type=click.IntRange(0, 3), default=1,
           help="Layers ahead that experts are guessed and read; 0: off."),
    option("--context", type=click.IntRange(1), help="Tokens of context to keep memory for. "
           "Default: the model's own, at most 4096."),
    option("--kv-dtype", type=click.Choice(["f16", "int8", "f32"]), default="f16",
           help="Precision of the KV cache."),
    option("--readers", type=click.IntRange(1), default=4,
           help="Experts that are read from disk at a time, at most; fewer where that is quicker."),
    option("--drop-cold", type=click.FloatRange(0, 1), default=0.0, metavar="R",
           help="Lossy: while writing, do without experts that have less than this share of the "
           "largest weight and would have to be read from disk. 0: never."),
    option("--cold-copy", metavar="MODEL", help="Lossy: the same model in fewer bits. While "
           "writing, experts of little weight are read from it, if not in memory."),
    option("--cold-below", type=click.FloatRange(0, 1, min_open=True), default=0.5, metavar="R",
           help="With --cold-copy: little is less than this share of the largest weight."),
    option("--device", default="cpu", metavar="NAME",
           help="cpu; auto, cuda or cuda:N for a GPU (experimental: not yet run on a real card); "
           "cuda:0,cuda:1 or cuda:all for several, which share the layers; sim:CARD (rtx4090, ...: "
           "see `tiered plan --help`), or sim:CARD,sim:CARD, for described cards, simulated in "
           "RAM: the last line tells what they would have taken; sim, or sim:2 for two, for a "
           "GPU's arithmetic on the CPU."),
    option("--vram", metavar="SIZE", help="What may be used of the GPU's memory, as 16G; "
           "of several, each one's, or 16G,8G. Default: what is free, or what a described one "
           "has."),
    option("--isa", default="auto", metavar="NAME", help="Force the kernels of a processor family "
           "that this machine can run."),
)  # fmt: skip

engine_options = several(
    option("--expert-ram", metavar="SIZE", help="Memory for experts alone, as 2G."),
    option("--quantize", type=click.Choice(QUANTIZATIONS), default="int4",
           help="How a checkpoint's weights are computed with: float experts in 4 bits (int4: "
           "Q4_0), or every weight as stored, in float32."),
    other_engine_options,
)  # fmt: skip

ENGINE_CHOICES = (
    "ram", "expert_ram", "threads", "policy", "look_ahead", "quantize", "context", "kv_dtype",
    "readers", "drop_cold", "cold_copy", "cold_below", "device", "vram", "isa",
)  # fmt: skip


def _routing_options(*short: str) -> Callable[[Command], Command]:
    """Rules for the routers. `short` are names that mean sampling in commands that sample."""

    def names(long: str) -> list[str]:
        return [f"--expert-{long}", *(name for name in short if name == f"--{long}")]

    return several(
        option(*names("top-k"), type=click.IntRange(1), metavar="N",
               help="Lossy: experts per token; at most the model's own."),
        option("--expert-layer-k", "--layer-k", metavar="TABLE",
               help="Lossy: experts per token by layer, from a table of `tiered layer-k`."),
        option(*names("top-p"), type=click.FloatRange(0, 1, min_open=True), default=1.0,
               metavar="P",
               help="Lossy: the fewest experts that have this share of the chosen ones' weight."),
        option("--expert-min-weight", "--min-weight", type=click.FloatRange(0, 1), default=0.0,
               metavar="R",
               help="Lossy: only experts with at least this times the best one's weight."),
    )  # fmt: skip


routing_options = _routing_options()
routing_options_short = _routing_options("--top-k", "--top-p")

given_routing_option = option(
    "--routing", metavar="FILE", help="Experts and weights as a trace of the same text has them "
    "(see `tiered ppl --record` and `tiered trace`), or a table in JSON, the same for all tokens.",
)  # fmt: skip

ROUTING_CHOICES = (
    "expert_top_k", "expert_layer_k", "expert_top_p", "expert_min_weight", "routing",
)  # fmt: skip

speculate_option = option(
    "--speculate", type=click.Choice(["off", *SPECULATIONS]), default="off",
    help="Compute along what is likely to follow, while that is quicker; answers stay the same. "
    "lookup: what followed the last words where they stood before. mtp: what a layer of the "
    "model's own foresees, where it brings one. auto: mtp if it can be, else lookup.",
)  # fmt: skip

sampling_options = several(
    option("--max-new-tokens", "-n", type=click.IntRange(1), default=256, help="Stop after these."),
    option("--temperature", type=click.FloatRange(0), default=0.0,
           help="0: always the likeliest token."),
    option("--top-k", type=click.IntRange(0), default=0, help="Sample from the K best; 0: all."),
    option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
           help="Sample from the likeliest tokens that make up this much probability."),
    option("--min-p", type=click.FloatRange(0, 1), default=0.0,
           help="Drop tokens less likely than this times the best one."),
    option("--repetition-penalty", type=click.FloatRange(0, min_open=True), default=1.0,
           help="Above 1: make tokens that were used already less likely."),
    option("--seed", type=int, help="Make sampling repeatable."),
    option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
)  # fmt: skip

SAMPLING_CHOICES = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "stop",
)  # fmt: skip


def take(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Take the named options out of a command's keyword arguments."""
    return {name: options.pop(name) for name in names}
