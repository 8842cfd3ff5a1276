"""tiered batch"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tiered.batch.lines import check_lines, read_lines
from tiered.batch.output import OutputFile
from tiered.batch.run import Summary, run_batch
from tiered.commands import options as opt
from tiered.commands.output import notes, print_json, steps_progress

MOST_SHOWN = 5  # failed requests


@click.command("batch")
@click.argument("requests", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("answers", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@click.argument("model")
@opt.option("--parallel", type=click.IntRange(1), default=16, help="Requests computed at once.")
@opt.option(
    "--replicas",
    type=click.IntRange(1),
    default=1,
    help="Engines, each in a worker of its own; more than one need Ray.",
)
@opt.option(
    "--kv-tokens",
    type=click.IntRange(1),
    help="Tokens of KV cache for all requests and remembered prefixes. Default: four contexts.",
)
@opt.prefill_chunk_option
@opt.json_option
@opt.routing_options
@opt.engine_options
def command(
    requests: Path,
    answers: Path,
    model: str,
    parallel: int,
    replicas: int,
    kv_tokens: int | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Answer the requests of IN.jsonl with MODEL, into OUT.jsonl.

    The files are those of OpenAI's batches: a line of IN is {"custom_id": "a", "url":
    "/v1/chat/completions", "body": {...}}, and a line of OUT has the same custom_id; answers come
    in any order. Requests are computed together. A run that was stopped or killed goes on when it
    is given the same files: what OUT has is not computed again. A request that fails has its error
    in OUT; a line of IN that is no request is named before anything begins.

    With --replicas, workers are Ray's: of the cluster that RAY_ADDRESS names, where the model has
    the same path everywhere, or of this machine, which they share. If one dies, another goes on.
    """
    from tiered.hub.pulled import find_model

    if not requests.exists():
        raise click.UsageError(f"{requests} does not exist")
    if answers.exists() and answers.samefile(requests):
        raise click.UsageError("IN.jsonl and OUT.jsonl are the same file")
    path = find_model(model)
    choices["kv_tokens"] = kv_tokens or 4 * (choices["context"] or 4096)
    ids = check_lines(requests)
    with OutputFile(answers, ids) as output, steps_progress() as bar:
        before = len(output.done)
        task = bar.add_task("opening the model", total=len(ids), completed=before)
        summary = Summary()
        if before < len(ids):
            summary = _run(
                requests, output, path, choices, parallel, replicas,
                lambda count: bar.update(task, description="answering", advance=count),
            )  # fmt: skip
    if as_json:
        print_json({**asdict(summary), "answered_before": before})
    else:
        _show(summary, before)


def _show(summary: Summary, before: int) -> None:
    for custom_id, message in list(summary.failed.items())[:MOST_SHOWN]:
        notes.print(f"{custom_id}: {message}", style="yellow", markup=False)
    if len(summary.failed) > MOST_SHOWN:
        notes.print(f"and {len(summary.failed) - MOST_SHOWN} more failed", style="yellow")
    notes.print(
        f"{summary.answered} answered, {len(summary.failed)} failed, {before} had an answer; "
        f"{summary.prompt_tokens} tokens of prompts, {summary.new_tokens} new"
    )


def _run(
    requests: Path,
    output: OutputFile,
    path: Path,
    choices: dict[str, Any],
    parallel: int,
    replicas: int,
    progress: Any,
) -> Summary:
    try:
        from tiered.batch.worker import Worker  # imports numba and starlette

        if replicas > 1:
            import ray  # noqa: F401
    except ImportError as error:
        extra = "ray" if replicas > 1 else "serve"
        raise click.UsageError(
            f'{error}; pip install "tiered[{extra}]" brings what a batch needs'
        ) from None
    from tiered.batch.ray_workers import RayWorkers

    async def on_ray() -> Summary:
        async with RayWorkers(path, choices, parallel, replicas) as workers:
            progress(0)
            at_once = 2 * parallel * replicas  # as many again wait, so that no worker does
            lines = read_lines(requests)
            return await run_batch(lines, workers.ask, output, at_once, lambda: progress(1))

    if replicas > 1:
        return asyncio.run(on_ray())
    with Worker(path, choices, parallel) as worker:
        progress(0)
        lines = read_lines(requests)
        running = run_batch(lines, worker.ask, output, 2 * parallel, lambda: progress(1))
        return asyncio.run(running)
