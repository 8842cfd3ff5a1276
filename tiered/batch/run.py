"""The run of a batch: lines are asked, many at once, and answers written as they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tiered.batch.lines import Line
from tiered.batch.output import OutputFile

log = logging.getLogger("tiered")
Ask = Callable[[str, dict[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]


@dataclass
class Summary:
    """What a run did. `failed` are the custom_ids with an error for an answer, and its message."""

    answered: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0

    def add(self, custom_id: str, status: int, body: dict[str, Any]) -> None:
        if status >= 400:
            self.failed[custom_id] = body["error"]["message"]
            return
        self.answered += 1
        usage = body.get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens", usage.get("input_tokens", 0))
        self.new_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))


async def run_batch(
    lines: Iterable[Line],
    ask: Ask,
    output: OutputFile,
    at_once: int,
    on_answer: Callable[[], None] = lambda: None,
) -> Summary:
    """Ask what `output` has no answer to, so many at once. What `ask` raises ends the run."""
    waiting = (line for line in lines if line.custom_id not in output.done)
    summary = Summary()

    async def work() -> None:
        for line in waiting:
            status, body = await ask(line.url, line.body)
            output.append(line.custom_id, status, body)
            summary.add(line.custom_id, status, body)
            log.info("answered %s: %d", line.custom_id, status)
            on_answer()

    tasks = [asyncio.ensure_future(work()) for _ in range(at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return summary
