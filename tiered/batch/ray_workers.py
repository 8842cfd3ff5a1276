"""Workers on Ray: each is an actor with an engine of its own. One that dies is replaced."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tiered.batch.worker import Worker
from tiered.cluster import joined, shared_out
from tiered.serve.errors import ApiError, error_body

TRIES = 3  # workers that may die under a request before it is to blame


class RayWorker:
    """An actor, and how many requests it has."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.asked = 0


class RayWorkers:
    """`count` workers, spread over the cluster that RAY_ADDRESS names, or else on this machine.

    The model has the same path on all of them. `async with`: it is closed when the block is left,
    and so is Ray, if it was not running before. RuntimeError says what is missing.
    """

    def __init__(self, path: Path, choices: dict[str, Any], parallel: int, count: int) -> None:
        self.path, self.choices, self.parallel, self.count = path, choices, parallel, count
        self.workers: list[RayWorker] = []
        self._changed = asyncio.Condition()  # `workers` has one more

    async def __aenter__(self) -> RayWorkers:
        with ExitStack() as stack:
            self._ray = stack.enter_context(joined())
            stack.callback(self._kill)
            self.choices = shared_out(self._ray, self.choices, self.count)
            opened = await asyncio.gather(*(self._open() for _ in range(self.count)))
            self.workers.extend(opened)
            self._closing = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing.close()

    def _kill(self) -> None:
        for worker in self.workers:
            self._ray.kill(worker.actor)
        self.workers.clear()

    async def _open(self) -> RayWorker:
        """A worker that is ready; RuntimeError if its engine cannot be opened."""
        ray = self._ray
        options = dict(
            num_cpus=self.choices["threads"],
            max_concurrency=2 * self.parallel + 1,
            scheduling_strategy="SPREAD",
        )
        actor = ray.remote(**options)(_Actor).remote(self.path, self.choices, self.parallel)
        try:
            await actor.open.remote()
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a worker could not open the model: {error.cause}") from None
        except ray.exceptions.RayActorError:
            raise RuntimeError("a worker died while it opened the model: see Ray's log") from None
        return RayWorker(actor)

    async def ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The answer of whichever worker has least to do; of another, if that one dies."""
        for _ in range(TRIES):
            async with self._changed:
                await self._changed.wait_for(lambda: self.workers)
            worker = min(self.workers, key=lambda worker: worker.asked)
            worker.asked += 1
            try:
                status, answer = await worker.actor.ask.remote(url, body)
                return status, answer
            except self._ray.exceptions.RayActorError:
                await self._replace(worker)
            finally:
                worker.asked -= 1
        error = ApiError(f"{TRIES} workers died while they answered this", 500)
        return 500, error_body(error, url)

    async def _replace(self, dead: RayWorker) -> None:
        """Whoever notices first opens another; the others ask who is left."""
        if dead not in self.workers:
            return
        self.workers.remove(dead)
        worker = await self._open()
        async with self._changed:
            self.workers.append(worker)
            self._changed.notify_all()


class _Actor:
    """What Ray runs: a worker whose methods are all coroutines."""

    def __init__(self, path: Path, choices: dict[str, Any], parallel: int) -> None:
        self._worker = Worker(path, choices, parallel)

    async def open(self) -> None:
        await asyncio.to_thread(self._worker.open)

    async def ask(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return await self._worker.ask(url, body)
