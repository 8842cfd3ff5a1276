"""Replicas of the server on Ray Serve: one address, several engines."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from starlette.applications import Starlette

from tiered.cluster import joined, shared_out
from tiered.serve.server import listen
from tiered.serve.setup import Setup, opened

NAME = "tiered"


def app_of(setup: Setup) -> Callable[[], Starlette]:
    """Called in a replica's own process, with which the engine ends."""

    def build() -> Starlette:
        stack = ExitStack()
        _, app = stack.enter_context(opened(setup))
        app.state.opened = stack  # else the engine would be closed when the stack is collected
        return app

    return build


class Replicas:
    """`count` servers behind one port, while the block lasts. A replica that dies is replaced.

    A request goes to a replica that has little to do; remembered prefixes, the page and the metrics
    are each replica's own. When the block ends, requests get `drain_seconds` to end. RuntimeError
    and OSError say what is missing.
    """

    def __init__(
        self, setup: Setup, count: int, host: str, port: int, drain_seconds: int = 30
    ) -> None:
        self.setup, self.count = setup, count
        self.host, self.drain_seconds = host, drain_seconds
        with listen(host, port) as free:
            self.port: int = free.getsockname()[1]

    def __enter__(self) -> Replicas:
        from ray import serve

        with ExitStack() as stack:
            ray = stack.enter_context(joined())
            setup = self.setup._replace(choices=shared_out(ray, self.setup.choices, self.count))
            if serve.status().proxies:
                raise RuntimeError(
                    "Ray Serve is running in this cluster, and has its port and its applications: "
                    "end it (serve shutdown), or take another cluster"
                )
            stack.callback(serve.shutdown)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            serve.start(http_options={"host": self.host, "port": self.port})
            deployment = serve.deployment(
                name=NAME,
                num_replicas=self.count,
                max_ongoing_requests=setup.parallel + setup.queue,
                max_constructor_retry_count=1,
                graceful_shutdown_timeout_s=self.drain_seconds,
                ray_actor_options={"num_cpus": setup.choices["threads"]},
            )
            app = deployment(serve.ingress(app_of(setup))()).bind()
            try:
                serve.run(app, name=NAME, route_prefix="/")
            except RuntimeError:
                raise RuntimeError(f"a replica could not start: {_problem(serve)}") from None
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def _problem(serve: Any) -> str:
    """The last line of what a replica said: its exception."""
    message = serve.status().applications[NAME].deployments[NAME].message
    return str(message).strip().splitlines()[-1]


def wait_for_signal() -> None:
    """Until SIGTERM or SIGINT."""
    asked = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        asked.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
