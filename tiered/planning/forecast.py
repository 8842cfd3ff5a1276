"""Forecast: how fast a model would run on a described machine. Simulated, never measured.

A token's time is attention + the longer of the GPU's and the processor's experts + combining, layer
by layer, as queues on a virtual clock (simulation.py). Routing comes from a trace, or is synthetic
with a stated locality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tiered.config import DEFAULT_POLICY
from tiered.memory import format_bytes
from tiered.planning.hardware import Hardware
from tiered.planning.machine import Machine, Rates
from tiered.planning.prompt import prompt_seconds
from tiered.planning.simulation import Simulation
from tiered.planning.sizes import ModelSizes
from tiered.planning.strategies import GOVERNED, STRATEGIES, Budgets
from tiered.planning.synthetic import Routed, locality_of, routing

PROCESS = 450 << 20  # bytes of an interpreter with its libraries and workspace


@dataclass(frozen=True)
class Layout:
    """What goes where: bytes by purpose, in each memory."""

    dense: int
    kv: int
    vram_experts: int
    ram_experts: int
    all_experts: int
    on_gpu: bool  # dense weights and KV cache; else they are in RAM

    @property
    def budgets(self) -> Budgets:
        return Budgets(self.vram_experts, self.ram_experts)

    @property
    def only_on_disk(self) -> int:
        """Bytes of experts that are in no memory: RAM has those first that the GPU has not."""
        return max(0, self.all_experts - self.vram_experts - self.ram_experts)

    @property
    def needs_disk(self) -> bool:
        """Some experts are in no memory and have to be read while generating."""
        return self.only_on_disk > 0


def share_out(
    sizes: ModelSizes, hardware: Hardware, context: int, ram: int | None = None
) -> Layout:
    """What of the model goes where. `ram` is what the process may hold; default: 90 % of all.

    Raises MemoryError with the number that would work.
    """
    gpu, kv = hardware.gpu, sizes.kv(context)
    limit = int(0.9 * hardware.host.ram) if ram is None else ram
    on_device = sizes.dense - (0 if sizes.tied else sizes.embed)
    room = gpu.room - on_device - kv if gpu else -1
    in_ram = PROCESS + (sizes.embed if room >= 0 else sizes.dense + kv)
    left = limit - in_ram
    if left < sizes.floor:
        where = f"{hardware.name}: " if hardware.gpu else ""
        raise MemoryError(
            f"{where}{format_bytes(limit)} of RAM are too little for {sizes.name}: it needs "
            f"{format_bytes(in_ram + sizes.floor)} at least "
            f"({format_bytes(in_ram)}, and {format_bytes(sizes.floor)} for one layer's experts)"
        )
    experts = sizes.all_experts
    return Layout(
        dense=sizes.dense,
        kv=kv,
        vram_experts=min(experts, sizes.in_slots(max(0, room))),
        ram_experts=min(experts, left),
        all_experts=experts,
        on_gpu=room >= 0,
    )


@dataclass(frozen=True)
class Forecast:
    """One forecast; `terms` are seconds of an average token, and add up to it."""

    tok_s: float
    time_to_first_token: float
    terms: dict[str, float]
    vram_hit_pct: float
    ram_hit_pct: float  # of what is asked of RAM
    read_bytes_per_token: float  # from disk
    copied_bytes_per_token: float  # to the GPU
    layout: Layout
    simulated: bool = True

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    sizes: ModelSizes,
    hardware: Hardware,
    layout: Layout,
    *,
    tokens: Sequence[Routed] | None = None,
    prompt: Sequence[Sequence[int]] = (),
    warm: Sequence[Routed] = (),
    mapped: bool = True,
    locality: str = "typical",
    num_tokens: int = 96,
    warm_tokens: int = 64,
    context: int = 1024,
    prompt_tokens: int = 512,
    strategy: str = "tiered",
    policy: str = DEFAULT_POLICY,
    look_ahead: int = 1,
    accuracy: float = 0.85,
) -> Forecast:
    """Simulate decoding after `context` tokens, and a prompt of `prompt_tokens`. Where a strategy
    promotes experts, so is what governors may choose in its place: they find out what is quicker.

    `tokens` is routing from a trace, all of it timed, after the distinct experts per layer of its
    `prompt` and the tokens of `warm`, by which tiers are filled; without, it is synthetic, and
    timed after `warm_tokens` others. `mapped`: a model that fits is in memory from the start.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    hardware = hardware if layout.on_gpu else without_gpu(hardware)
    is_synthetic = tokens is None
    if tokens is None:
        made = routing(
            sizes.num_layers, sizes.num_experts, sizes.top_k, warm_tokens + num_tokens,
            locality_of(sizes.num_experts, locality),
        )  # fmt: skip
        warm, tokens, prompt = made[:warm_tokens], made[warm_tokens:], ()
    plans, forecasts = [STRATEGIES[strategy]], []
    if plans[0].promote and 0 < layout.vram_experts < layout.all_experts:
        plans += GOVERNED
    first = prompt_seconds(sizes, hardware, layout, prompt_tokens)
    for plan in plans:
        simulation = Simulation(
            sizes, Machine(Rates.of(hardware)), layout.budgets, plan,
            policy=policy, look_ahead=look_ahead, accuracy=accuracy, mapped=mapped,
            lockable=hardware.host.lockable,
        )  # fmt: skip
        fill_ram = is_synthetic or bool(warm)
        simulation.warm([*warm, *([prompt] if prompt else [])], fill_ram=fill_ram)
        simulation.prefill(prompt)
        for token in warm if is_synthetic else ():
            simulation.token(token, context)
        forecasts.append(_timed(simulation, tokens, context, layout, first))
    return max(forecasts, key=lambda got: got.tok_s)


def _timed(
    simulation: Simulation, tokens: Sequence[Routed], context: int, layout: Layout, first: float
) -> Forecast:
    """What these tokens take; the first one comes after `first` seconds."""
    simulation.reset()
    seconds = sum(simulation.token(token, context) for token in tokens)
    count, ram, machine = len(tokens), simulation.ram, simulation.machine
    return Forecast(
        tok_s=count / seconds,
        time_to_first_token=first,
        terms={name: total / count for name, total in simulation.terms.items()},
        vram_hit_pct=100 * simulation.hits / max(1, simulation.demands),
        ram_hit_pct=100 * ram.stats.hit_rate if ram else 100.0,
        read_bytes_per_token=machine.read_bytes / count,
        copied_bytes_per_token=machine.copied / count,
        layout=layout,
    )


def without_gpu(hardware: Hardware) -> Hardware:
    """The same machine, computing on its processor alone."""
    return Hardware(hardware.name, hardware.label, hardware.host, hardware.disk)
