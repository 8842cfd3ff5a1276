"""What a server is made of: the user's choices, and from them an engine and its interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from starlette.applications import Starlette

from tiered.engine import Engine
from tiered.serve.app import make_app
from tiered.serve.scheduler import Scheduler
from tiered.serve.service import Limits, Service


class Setup(NamedTuple):
    """Made once, and opened by whichever process serves."""

    path: Path
    choices: dict[str, Any]  # of EngineConfig
    names: tuple[str, ...]
    parallel: int = 16
    queue: int = 256
    limits: Limits = Limits()
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


@contextmanager
def opened(setup: Setup) -> Iterator[tuple[Service, Starlette]]:
    with (
        Engine(setup.path, **setup.choices) as engine,
        Scheduler(engine, max_running=setup.parallel, max_waiting=setup.queue) as scheduler,
    ):
        service = Service(engine, scheduler, setup.names, setup.limits)
        yield service, make_app(service, setup.api_keys, setup.allowed_origins)
