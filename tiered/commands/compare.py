"""tiered compare"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import give_json, notes, results, rules_report, steps_progress
from tiered.commands.settings import parse_settings
from tiered.memory import format_bytes
from tiered.version import __version__

if TYPE_CHECKING:
    from tiered.quality.saved import SavedSide
    from tiered.quality.side import Side, TextPlan

NUM_GENERATED, NUM_PROMPT = 128, 32  # tokens
# Options that may change what a model says, and so belong to what is reported; others never do.
TOLD = "quantize", "kv_dtype", "device", "isa", *opt.ROUTING_CHOICES


own_options = opt.several(
    opt.option("--text", metavar="FILE", type=click.Path(path_type=Path),
               help="A text in UTF-8. Not needed with a saved file, which has its own."),
    opt.option("--a", "a_settings", multiple=True, metavar="KEY=VALUE",
               help="An option for A alone, as quantize=none; may be repeated."),
    opt.option("--b", "b_settings", multiple=True, metavar="KEY=VALUE",
               help="An option for B alone."),
    opt.option("--save", metavar="FILE", type=click.Path(path_type=Path),
               help="Compare nothing: write what A says to FILE, which can then stand for A or B."),
    opt.option("--generate", type=click.IntRange(0), metavar="N",
               help="Tokens of a greedy continuation of the text's beginning; 0: none. "
               f"Default: {NUM_GENERATED}."),
    opt.option("--prompt-tokens", type=click.IntRange(1),
               help=f"Tokens of the text that are continued. Default: {NUM_PROMPT}."),
    opt.option("--tasks", metavar="FILE", type=click.Path(path_type=Path),
               help="Multiple-choice tasks, one a line: "
               '{"question": ..., "choices": [...], "answer": index}.'),
)  # fmt: skip


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path), required=False)
@own_options
@opt.text_window_options
@opt.json_file_option
@opt.routing_options_short
@opt.given_routing_option
@opt.engine_options
def command(
    a: Path,
    b: Path | None,
    a_settings: tuple[str, ...],
    b_settings: tuple[str, ...],
    save: Path | None,
    json_file: str | None,
    **asked: Any,
) -> None:
    """Compare what B says with what A says: token by token of a text, A being the reference.

    A and B are models, or files that --save wrote, perhaps on another machine. Without B it is A,
    with other settings: `tiered compare MODEL --a quantize=none --b quantize=int4 --text FILE`.
    Both are open at once; models that do not fit together can be compared through a file.

    Reports the divergence (KL, in nats) of the next token's distributions, how often the likeliest
    token is the same, both perplexities and their ratio, the experts that both routers chose, where
    greedy continuations part, and accuracy on tasks. Intervals are a confidence of 95 %.
    """
    from tiered.quality.side import LiveSide, check_same_tokens

    names = opt.ENGINE_CHOICES + opt.ROUTING_CHOICES
    choices = opt.take(asked, names)
    choices["context"] = choices["context"] or asked["window"]
    own = [parse_settings(f"--{name}", given, names)
           for name, given in (("a", a_settings), ("b", b_settings))]  # fmt: skip
    with ExitStack() as stack:
        first = open_side(stack, a, choices, own[0])
        if save is not None:
            if b is not None or b_settings:
                raise click.UsageError("--save writes what A says: leave B out")
            write(first, make_plan([first], **asked), save)
            return
        second = open_side(stack, b or a, choices, own[1])
        check_same_tokens(first.facts, second.facts)
        report = run(first, second, make_plan([first, second], **asked))
        for name, side in (("a", first), ("b", second)):
            if isinstance(side, LiveSide):
                report[name] |= rules_report(side.engine.stats)
    if give_json({"tiered": __version__, **report}, json_file):
        show(report)


def open_side(
    stack: ExitStack, path: Path, choices: dict[str, Any], settings: dict[str, Any]
) -> Side:
    from tiered.config import EngineConfig
    from tiered.quality.saved import SavedSide, is_saved
    from tiered.quality.side import LiveSide

    if is_saved(path):
        if settings:
            raise click.UsageError(f"{path} is saved: its settings cannot be changed")
        return SavedSide(path)
    engine = stack.enter_context(open_engine(path, {**choices, **settings}))
    usual = EngineConfig()
    told = {name: choices[name] for name in TOLD if choices[name] != getattr(usual, name)}
    return LiveSide(engine, str(path), {k: str(v) for k, v in {**told, **settings}.items()})


def make_plan(
    sides: list[Side],
    text: Path | None,
    window: int | None,
    stride: int | None,
    max_tokens: int | None,
    generate: int | None,
    prompt_tokens: int | None,
    tasks: Path | None,
) -> TextPlan:
    """What is asked: as a saved side was, or as the options say; UsageError if they differ."""
    from tiered.commands.ppl import check_window
    from tiered.quality.perplexity import window_sizes
    from tiered.quality.saved import SavedSide
    from tiered.quality.side import LiveSide, TextPlan
    from tiered.quality.tasks import read_tasks
    from tiered.quality.text import text_tokens

    to_do = tuple(read_tasks(tasks)) if tasks else ()
    engines = [side.engine for side in sides if isinstance(side, LiveSide)]
    for engine in engines:
        check_window(engine, window)
    ids: tuple[int, ...] = ()
    if text is not None and engines:
        ids = tuple(text_tokens(engines[0].tokenizer, text, max_tokens))
    elif max_tokens is not None:
        raise click.UsageError("--max-tokens goes with a --text")
    saved = [side for side in sides if isinstance(side, SavedSide)]
    if saved:
        check_plans(saved, (ids or None, window, stride, prompt_tokens, generate))
        plan = saved[0].plan._replace(tasks=to_do)
    elif ids:
        context = min(engine.context for engine in engines)
        size, step = window_sizes(len(ids), context, window, stride)
        prompt = min(prompt_tokens or NUM_PROMPT, len(ids), context)
        count = NUM_GENERATED if generate is None else generate
        plan = TextPlan(ids, size, step, prompt, count, to_do)
    else:
        raise click.UsageError("give a --text")
    if any(engine.is_of_one_text for engine in engines):
        if generate or to_do:
            raise click.UsageError(
                "a recorded routing is one of the text: it does not suit --generate or --tasks"
            )
        plan = plan._replace(num_generated=0)
    return plan


def check_plans(saved: list[SavedSide], given: tuple[Any, ...]) -> None:
    """UsageError if two saved sides were asked different things, or the options say others."""
    names = "text", "window", "stride", "prompt-tokens", "generate"
    first = saved[0].plan
    for other in (given, *(side.plan for side in saved)):
        for name, kept, wanted in zip(names, first, other, strict=False):
            if wanted is not None and wanted != kept:
                raise click.UsageError(
                    f"{saved[0].path} was saved with another --{name}; leave the option out, or "
                    "save again"
                )


def write(side: Side, plan: TextPlan, path: Path) -> None:
    from tiered.quality.saved import save

    with steps_progress() as bar:
        task = bar.add_task("saving", total=plan.num_predicted)
        save(
            side,
            plan,
            path,
            lambda rows: bar.advance(task, rows),
            lambda what: bar.update(task, description=what),
        )
    notes.print(f"wrote {path}: {format_bytes(path.stat().st_size)}")


def run(a: Side, b: Side, plan: TextPlan) -> dict[str, Any]:
    from tiered.quality.compare import compare

    with steps_progress() as bar:
        task = bar.add_task("comparing", total=plan.num_predicted)
        return compare(
            a,
            b,
            plan,
            lambda rows: bar.advance(task, rows),
            lambda what: bar.update(task, description=what),
        )


def show(report: dict[str, Any]) -> None:
    for name in "a", "b":
        side = report[name]
        settings = " ".join(f"{key}={value}" for key, value in side["settings"].items())
        results.print(f"{name.upper()}: {side['name']} {settings}".rstrip())
        if "dropped" in side:
            shares = f"{side['dropped']:.1%} of the experts, {side['dropped_weight']:.1%}"
            results.print(f"   rules drop {shares} of the weight", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for row in table_rows(report):
        table.add_row(*row)
    results.print(table)
    by_layer = report.get("routing_agreement_by_layer", {})
    if by_layer:
        listed = " ".join(f"{layer}:{share:.3f}" for layer, share in by_layer.items())
        results.print(f"shared experts by layer: {listed}", style="dim")


def table_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much, remark) for what the report has."""
    r = report
    low, high = r["kl_mean_interval"]
    ratio_low, ratio_high = r["perplexity_ratio_interval"]
    rows = [
        ("KL divergence, mean", f"{r['kl_mean']:.6f}", f"95 %: {low:.6f} to {high:.6f} nats"),
        ("KL divergence, 99 %", f"{r['kl_99']:.6f}", ""),
        ("KL divergence, largest", f"{r['kl_max']:.6f}", ""),
        ("same likeliest token", f"{r['top_1_agreement']:.2%}", f"of {r['predicted']} tokens"),
        ("perplexity of A", f"{r['perplexity_a']:.4f}", ""),
        ("perplexity of B", f"{r['perplexity_b']:.4f}", ""),
        ("ratio B / A", f"{r['perplexity_ratio']:.5f}",
         f"95 %: {ratio_low:.5f} to {ratio_high:.5f}"),
    ]  # fmt: skip
    if "routing_agreement" in r:
        rows.append(("shared experts", f"{r['routing_agreement']:.2%}", "of a token's, all layers"))
    if "drift" in r:
        drift = r["drift"]
        first = drift["first_difference"]
        where = "no difference" if first is None else f"first difference at token {first}"
        remark = f"of {drift['generated']} tokens, {where}"
        rows.append(("greedy continuation", f"{drift['agreement']:.2%}", remark))
    if "tasks" in r:
        found = r["tasks"]
        for kind in "plain", "normalized":
            pair = " and ".join(f"{found[f'accuracy_{side}'][kind]:.2%}" for side in "ab")
            rows.append((f"accuracy, {kind}", pair, f"A and B, {found['tasks']} tasks"))
        rows.append(("same choice", f"{found['same_choice']:.2%}", ""))
    return rows
