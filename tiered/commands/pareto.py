"""tiered pareto"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.lists import budgets, floats, integers, split
from tiered.commands.output import give_json, notes, results, steps_progress
from tiered.commands.prune import NAMES as CRITERIA
from tiered.config import QUANTIZATIONS
from tiered.memory import format_bytes
from tiered.version import __version__

if TYPE_CHECKING:
    from tiered.measuring.pareto import Lab, Point
    from tiered.measuring.results import ResultFile
    from tiered.quality.saved import SavedSide
    from tiered.quality.side import TextPlan

CALIBRATION_TOKENS = 8192
VERSION = 12  # letters of a digest
AXES = "quantize", "experts", "top_k", "layer_k", "top_p", "min_weight", "expert_ram"
Rows = list[dict[str, str]]


@click.command("pareto")
@opt.model_argument
@opt.text_option
@opt.option("--quantize", metavar="NAMES", default="int4",
            help=f"How weights are computed with: {', '.join(QUANTIZATIONS)}.")  # fmt: skip
@opt.option("--experts", metavar="COUNTS", help="Per layer, MODEL's own or pruned to fewer: 8,6,4. "
            "Default: its own.")  # fmt: skip
@opt.option("--top-k", metavar="COUNTS", default="0",
            help="Experts per token; 0: the model's own.")  # fmt: skip
@opt.option("--layer-k", metavar="TABLES", default="none", help="Experts per token by layer, from "
            "tables of `tiered layer-k`; none: the model's own.")  # fmt: skip
@opt.option("--top-p", metavar="SHARES", default="1", help="The fewest experts with this share of "
            "the weight.")  # fmt: skip
@opt.option("--min-weight", metavar="RATIOS", default="0", help="Only experts with this times the "
            "best one's weight.")  # fmt: skip
@opt.option("--expert-ram", metavar="SIZES", default="all", help="Budgets for experts, 2G,3G or "
            "100%,60% of MODEL's in the first precision; all: what they need.")  # fmt: skip
@opt.option("--also", multiple=True, metavar="MODEL", type=click.Path(path_type=Path),
            help="Another file of the same model, as of other precision; may be repeated."
            )  # fmt: skip
@opt.option("--calibration", metavar="FILE", type=click.Path(path_type=Path), help="With fewer "
            "--experts: the text that says which stay. It should not be that of --text."
            )  # fmt: skip
@opt.option("--criterion", type=click.Choice(CRITERIA), default="reap",
            help="As of `tiered prune`.")  # fmt: skip
@opt.option("--merge", is_flag=True, help="As of `tiered prune`.")
@opt.window_options
@opt.option("--max-tokens", type=click.IntRange(2), default=2048, help="Of the text.")
@opt.option("--prefill", type=click.IntRange(1), default=64,
            help="Tokens of the text that speed is measured after.")  # fmt: skip
@opt.option("--decode", type=click.IntRange(2), default=64,
            help="Tokens of the text that are written, to measure speed.")  # fmt: skip
@opt.option("--runs", type=click.IntRange(1), default=3, help="Of which speed is the median.")
@opt.option("--out", type=click.Path(path_type=Path), default="pareto.csv", help="CSV file; what "
            "it has is not repeated. What else has to be kept stands beside it.")  # fmt: skip
@opt.plot_option()
@opt.json_file_option
@opt.other_engine_options
def command(
    model: Path,
    text: Path,
    window: int | None,
    stride: int | None,
    max_tokens: int,
    prefill: int,
    decode: int,
    runs: int,
    out: Path,
    plot: Path | None,
    json_file: str | None,
    calibration: Path | None,
    **asked: Any,
) -> None:
    """Measure speed and quality of MODEL over a grid of settings, and find those that none beats.

    Options that take several values, separated by commas, span the grid: how weights are computed
    with, experts per layer, rules for the routers, memory. Quality is how far the next token's
    distributions are from those of MODEL with its weights as stored (KL divergence, and the ratio
    of perplexities, as `tiered compare` has them); speed is that of writing the text's own tokens.
    Under each budget, the frontier is the settings than which none is both faster and nearer.

    A run that was stopped goes on when it is given again. A point that cannot run is told with its
    reason, and ends nothing.
    """
    from tiered.measuring.pareto import COLUMNS, NUM_KEYS, Lab, frontiers, key
    from tiered.measuring.results import ResultFile

    also, criterion, merge = (asked.pop(name) for name in ("also", "criterion", "merge"))
    axes = opt.take(asked, AXES)
    for name in ("drop_cold", "cold_copy"):
        if asked[name]:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"what {option} costs depends on memory: it has no price here")
    context = window and max(window, prefill + decode)
    choices = {**asked, "context": asked["context"] or context}
    pruning = Pruning(model, out, calibration, criterion, merge, choices)
    points = list(grid(model, also, axes, pruning))
    plan = make_plan(model, text, window, stride, max_tokens, choices)
    if prefill + decode > min(len(plan.ids), choices["context"] or len(plan.ids)):
        raise click.UsageError(
            f"--prefill and --decode are more tokens than {text}, or a --context, has"
        )
    setup = digest([plan, prefill, decode, runs, sorted(choices.items())])
    file = ResultFile(out, COLUMNS, NUM_KEYS)
    todo = [point for point in points if key(setup, point) not in file]
    if todo:
        reference = saved_reference(model, plan, out.with_suffix(".logits"), choices)
        for point in todo:
            pruning.write(point)
        prompt, answer = plan.ids[:prefill], plan.ids[prefill : prefill + decode - 1]
        measure(todo, Lab(reference, prompt, answer, runs, choices), pruning, setup, file)
    rows = [file.find(key(setup, point)) for point in points]
    best = frontiers(rows)
    if plot is not None:
        draw(rows, best, plot, model, plan)
    report = {
        "tiered": __version__, "model": str(model), "text": str(text), "tokens": len(plan.ids),
        "window": plan.size, "stride": plan.stride, "points": rows,
        "frontiers": {budget: [rows[i] for i in found] for budget, found in best.items()},
    }  # fmt: skip
    if give_json(report, json_file):
        show(rows, best)


# --- what is asked ---


def make_plan(
    model: Path,
    text: Path,
    window: int | None,
    stride: int | None,
    max_tokens: int,
    choices: dict[str, Any],
) -> TextPlan:
    from tiered.engine import DEFAULT_CONTEXT
    from tiered.formats import open_checkpoint
    from tiered.quality.perplexity import window_sizes
    from tiered.quality.side import TextPlan
    from tiered.quality.text import text_tokens
    from tiered.text.tokenizer import load_tokenizer

    with open_checkpoint(model) as checkpoint:
        longest = min(choices["context"] or DEFAULT_CONTEXT, checkpoint.config.context_length)
        ids = tuple(text_tokens(load_tokenizer(checkpoint.tokenizer_source), text, max_tokens))
    if window is not None and window > longest:
        raise ValueError(f"a window of {window} tokens is more than the context of {longest}")
    return TextPlan(ids, *window_sizes(len(ids), longest, window, stride), 1, 0)


def digest(value: Any) -> str:
    """A short name of what all points have in common: other text or other options, other rows."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:VERSION]


def grid(
    model: Path, also: tuple[Path, ...], axes: dict[str, str | None], pruning: Pruning
) -> Iterator[Point]:
    """The model with each number of experts, and the others as they are, each with each setting
    under each budget."""
    from tiered.formats import open_checkpoint
    from tiered.measuring.pareto import Point, expert_bytes

    precisions = split(axes["quantize"] or "")
    for name in precisions or [""]:
        if name not in QUANTIZATIONS:
            known = ", ".join(QUANTIZATIONS)
            raise click.UsageError(f"--quantize takes {known}, separated by commas, not {name!r}")
    tables = ["" if name == "none" else name for name in split(axes["layer_k"] or "none")]
    with open_checkpoint(model) as checkpoint:
        own = checkpoint.config.num_experts
        whole = expert_bytes(checkpoint, precisions[0])
    counts = integers("--experts", axes["experts"] or str(own))
    if set(counts) != {own} and pruning.text is None and pruning.needs_text:
        raise click.UsageError("fewer --experts need a --calibration text, by which to prune")
    files = [(str(model), count, pruning.label if count != own else "") for count in counts]
    for other in also:
        with open_checkpoint(other) as checkpoint:
            files.append((str(other), checkpoint.config.num_experts, ""))
    rules = product(
        integers("--top-k", axes["top_k"] or "0"),
        tables,
        floats("--top-p", axes["top_p"] or "1"),
        floats("--min-weight", axes["min_weight"] or "0"),
    )
    memory = budgets(axes["expert_ram"], whole)
    named = {path for path, *_ in files} | set(tables)
    versions = {name: version(Path(name)) if name else "" for name in named}
    for (path, experts, pruned), quantize, (top_k, table, top_p, min_weight), ram in dict.fromkeys(
        product(files, precisions, rules, memory)
    ):
        yield Point(
            path, versions[path] + versions[table], experts, pruned, quantize, top_k, table, top_p,
            min_weight, ram,
        )  # fmt: skip


def version(path: Path) -> str:
    """Changes when the file, or a file of the folder, does."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return digest([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])


# --- what is kept beside the CSV file ---


class Pruning:
    """Checkpoints with fewer experts, made when a point wants them, and kept for the next run."""

    def __init__(
        self,
        model: Path,
        out: Path,
        text: Path | None,
        criterion: str,
        merge: bool,
        choices: dict[str, Any],
    ) -> None:
        self.model, self.text, self.criterion, self.merge = model, text, criterion, merge
        self.choices = choices
        self.folder = out.with_suffix(".pruned")
        self._problems: dict[Path, str] = {}  # why a checkpoint could not be made
        read = digest(text.read_bytes().hex()) if text is not None else ""
        self.needs_text = merge or criterion != "random"
        self.label = " ".join(filter(None, [criterion, "merged" if merge else "", read]))

    def path(self, point: Point) -> Path:
        if not point.pruned:
            return Path(point.model)
        name = f"{point.experts} {point.pruned} {point.version[:VERSION]}"
        return self.folder / name.replace(" ", "-")

    def problem(self, point: Point) -> str:
        """Why there is no checkpoint for the point; empty: there is."""
        return self._problems.get(self.path(point), "")

    def write(self, point: Point) -> None:
        """Make the point's checkpoint, unless it is there, or was found impossible."""
        from tiered.commands.prune import write_pruned

        path = self.path(point)
        if path.exists() or path in self._problems:
            return
        try:
            write_pruned(
                self.model, path, point.experts, self.criterion, self.merge, self.text,
                CALIBRATION_TOKENS, 0, {**self.choices, "quantize": "none"},
            )  # fmt: skip
        except (ValueError, MemoryError, OSError) as error:
            self._problems[path] = str(error)


def saved_reference(model: Path, plan: TextPlan, path: Path, choices: dict[str, Any]) -> SavedSide:
    """What the model says with its weights as stored, said once and kept."""
    from tiered.commands.compare import write
    from tiered.commands.loading import open_engine
    from tiered.quality.saved import SavedSide
    from tiered.quality.side import LiveSide

    settings = {"quantize": "none", "version": version(model)}
    if path.exists():
        side = SavedSide(path)
        if side.plan == plan and side.facts.settings == settings:
            return side
    with open_engine(model, {**choices, "quantize": "none"}) as engine:
        write(LiveSide(engine, str(model), settings), plan, path)
    return SavedSide(path)


# --- measuring ---


def measure(
    points: Sequence[Point], lab: Lab, pruning: Pruning, setup: str, file: ResultFile
) -> None:
    """Write each point's row as soon as it is known."""
    from tiered.measuring.pareto import failed, key

    num_predicted = lab.reference.plan.num_predicted
    with steps_progress() as bar:
        task = bar.add_task("points", total=len(points))
        text = bar.add_task("comparing", total=num_predicted)
        for point in points:
            found, wanted = failed(pruning.problem(point)), key(setup, point)
            if not found["problem"]:
                bar.reset(text, total=num_predicted)
                known = file.alike(wanted, but="expert_ram")
                found = lab.measure(
                    pruning.path(point), point, known, lambda rows: bar.advance(text, rows)
                )
            file.append({**wanted, **found})
            bar.advance(task)


# --- what is shown ---


def draw(rows: Rows, best: dict[str, list[int]], path: Path, model: Path, plan: TextPlan) -> None:
    from tiered.measuring.frontier_plot import plot_frontiers

    note = f"{len(plan.ids)} tokens; measured on this machine"
    plot_frontiers(rows, best, path, model.name, note)
    notes.print(f"wrote {path}", style="dim")


def show(rows: Rows, best: dict[str, list[int]]) -> None:
    from tiered.measuring.frontier_plot import describe

    on_frontier = {i for found in best.values() for i in found}
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("")
    table.add_column("setting")
    for title in ("memory", "tokens/s", "hits", "KL", "same", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        budget, star = int(row["expert_ram"]), "*" if i in on_frontier else ""
        what = describe(row, rows), format_bytes(budget) if budget else "all"
        if row["problem"]:
            table.add_row("", *what, "-")
            continue
        numbers = "decode_tok_s", "hit_rate", "kl", "same_token", "ratio"
        speed, hits, kl, same, ratio = (float(row[name]) for name in numbers)
        table.add_row(
            star, *what, f"{speed:.2f}", f"{hits:.1%}", f"{kl:.4f}", f"{same:.1%}", f"{ratio:.3f}"
        )
    results.print(table)
    words = "*: nothing under this budget is both faster and nearer; same: the likeliest token"
    results.print(words, style="dim")
    for problem in dict.fromkeys(row["problem"] for row in rows if row["problem"]):
        names = dict.fromkeys(describe(row, rows) for row in rows if row["problem"] == problem)
        text = f"does not run: {', '.join(names)}: {problem}"
        results.print(text, style="yellow", markup=False)
