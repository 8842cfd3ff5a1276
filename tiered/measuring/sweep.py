"""Sweep: speed over a grid of memory sizes, policies and lengths; simulated, or on the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from tiered.config import DEFAULT_POLICY
from tiered.planning.forecast import forecast, share_out
from tiered.planning.hardware import GB, Hardware
from tiered.planning.sizes import ModelSizes
from tiered.planning.synthetic import Routed


@dataclass(frozen=True)
class Point:
    """One measurement of a sweep. Sizes are bytes; 0 tokens of top_k: the model's own."""

    vram: int = 0
    ram: int = 0  # of the machine; live: for experts
    strategy: str = "tiered"
    policy: str = DEFAULT_POLICY
    look_ahead: int = 1
    top_k: int = 0
    context: int = 1024


RESULTS = (
    "tok_s", "ms_per_token", "time_to_first_token", "vram_hit_pct", "ram_hit_pct",
    "read_mb_per_token", "copied_mb_per_token", "simulated", "problem",
)  # fmt: skip
POINT = tuple(field.name for field in fields(Point))
COLUMNS = ("model", "hardware", "routing", *POINT, *RESULTS)
NUM_KEYS = 3 + len(POINT)


def grid(**axes: Sequence[Any]) -> Iterator[Point]:
    """All combinations, the last axis fastest."""
    for values in product(*axes.values()):
        yield Point(**dict(zip(axes, values, strict=True)))


def key(model: str, hardware: str, routing: str, point: Point) -> dict[str, Any]:
    """What identifies a row."""
    return {"model": model, "hardware": hardware, "routing": routing, **asdict(point)}


def simulate(
    model: ModelSizes,
    machine: Hardware,
    point: Point,
    *,
    tokens: Sequence[Routed] | None = None,
    prompt: Sequence[Sequence[int]] = (),
    warm: Sequence[Routed] = (),
    locality: str = "typical",
    prompt_tokens: int = 512,
) -> dict[str, Any]:
    """The results of one point by simulation; `problem` says why there are none."""
    machine = machine.with_sizes(ram=point.ram or None, vram=point.vram or None)
    if point.top_k:
        model = model.with_top_k(point.top_k)
    try:
        got = forecast(
            model, machine, share_out(model, machine, point.context),
            tokens=tokens, prompt=prompt, warm=warm, locality=locality, context=point.context,
            prompt_tokens=min(prompt_tokens, point.context), strategy=point.strategy,
            policy=point.policy, look_ahead=point.look_ahead,
        )  # fmt: skip
    except MemoryError as error:
        return failed(str(error), simulated=True)
    return {
        "tok_s": got.tok_s,
        "ms_per_token": 1000 / got.tok_s,
        "time_to_first_token": got.time_to_first_token,
        "vram_hit_pct": got.vram_hit_pct,
        "ram_hit_pct": got.ram_hit_pct,
        "read_mb_per_token": got.read_bytes_per_token / 1e6,
        "copied_mb_per_token": got.copied_bytes_per_token / 1e6,
        "simulated": True,
        "problem": "",
    }


def run_live(
    path: Path, point: Point, *, prompt: Sequence[int], num_tokens: int, **choices: Any
) -> dict[str, Any]:
    """The results of one point on this machine's engine; `point.ram` is the experts' budget."""
    from tiered.engine import Engine  # imports numba

    try:
        with Engine(
            path, expert_ram=point.ram or None, policy=point.policy,
            look_ahead=point.look_ahead, context=point.context, **choices,
        ) as engine:  # fmt: skip
            list(engine.generate_tokens(prompt[:2], 2))  # kernels are compiled, threads are awake
            before, start = engine.stats, perf_counter()
            list(engine.generate_tokens(prompt, num_tokens))
            seconds, stats = perf_counter() - start, engine.stats - before
    except MemoryError as error:
        return failed(str(error), simulated=False)
    tok_s = stats.decode_tok_s or 1 / max(seconds, 1e-9)
    return {
        "tok_s": tok_s,
        "ms_per_token": 1000 / tok_s,
        "time_to_first_token": stats.prefill_seconds,
        "vram_hit_pct": 0.0,
        "ram_hit_pct": 100 * stats.hit_rate,
        "read_mb_per_token": stats.bytes_per_token / 1e6,
        "copied_mb_per_token": 0.0,
        "simulated": False,
        "problem": "",
    }


def failed(problem: str, simulated: bool) -> dict[str, Any]:
    empty = dict.fromkeys(RESULTS, "")
    return {**empty, "simulated": simulated, "problem": problem}


def roofs(model: ModelSizes, machine: Hardware) -> dict[str, float]:
    """Tokens per second that each memory's bandwidth alone would allow, if all came from there.

    Dense weights come from the fastest; caching decides how near to which roof a machine gets.
    """
    gpu, host = machine.gpu, machine.host
    dense = sum(model.attention) + sum(model.shared) + model.head
    fastest = gpu.bandwidth if gpu else host.bandwidth
    memories = {"RAM": host.bandwidth, "disk": machine.disk.bandwidth}
    if gpu:
        memories = {"GPU memory": gpu.bandwidth, "GPU link": gpu.link, **memories}
    return {
        name: GB / (dense / fastest + model.active_experts / bandwidth)
        for name, bandwidth in memories.items()
    }
