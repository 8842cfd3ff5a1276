"""Ray's cluster: joined or started, and shared out among replicas of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tiered.memory import default_limit


@contextmanager
def joined() -> Iterator[Any]:
    """The `ray` package with a cluster: the one that runs or that RAY_ADDRESS names, or else one of
    this machine, which ends with the block."""
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def shared_out(ray: Any, choices: dict[str, Any], count: int) -> dict[str, Any]:
    """`choices` for one of `count` replicas: its threads and, where nobody says, its memory.

    RuntimeError if there are too few CPUs: Ray would wait for more without a word.
    """
    cpus = int(ray.cluster_resources().get("CPU", 0))
    threads = choices.get("threads") or max(1, cpus // count)
    if threads * count > cpus:
        raise RuntimeError(
            f"{count} workers of {threads} threads need {threads * count} CPUs, and Ray has "
            f"{cpus}: give less --replicas or --threads"
        )
    choices = {**choices, "threads": threads}
    if choices.get("ram") is None and choices.get("expert_ram") is None:
        choices["ram"] = default_limit() // math.ceil(count / len(ray.nodes()))
    return choices


def each(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """(position in `calls`, result) of each call on the cluster, as they are done.

    Ray repeats what a dying worker leaves undone. What `function` raises ends it.
    """
    with joined() as ray:
        remote = ray.remote(num_cpus=1)(function)
        waiting = {remote.remote(*call): position for position, call in enumerate(calls)}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            try:
                yield waiting.pop(done), ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
