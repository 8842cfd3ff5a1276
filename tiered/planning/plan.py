"""Plan: does a model fit on a machine, how fast would it be, and what would more memory buy.

Answers from sizes alone, before any download. Simulated, never measured.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tiered.config import DEFAULT_POLICY
from tiered.planning.forecast import Forecast, Layout, forecast, share_out
from tiered.planning.hardware import Hardware
from tiered.planning.sizes import ModelSizes

RAM_STEPS = tuple(gib << 30 for gib in (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024))
VRAM_STEPS = tuple(gib << 30 for gib in (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 80, 96, 141, 192))
ROUTED = 20_000  # experts that a simulation routes: enough for a steady picture
SLOWER = 0.85  # of the described efficiencies, for the low end of the band


@dataclass(frozen=True)
class Step:
    """What one more step of some memory would bring; `tok_s` is None if it is still too little."""

    memory: str  # "ram" or "vram"
    nbytes: int
    tok_s: float | None


@dataclass(frozen=True)
class Plan:
    """`low` and `high` bound the speed by how predictable the routing is."""

    model: ModelSizes
    hardware: Hardware
    context: int
    prompt_tokens: int
    problem: str  # why it does not run; "": it does
    typical: Forecast | None = None
    low: float = 0.0  # tok/s
    high: float = 0.0
    steps: tuple[Step, ...] = ()
    simulated: bool = True

    @property
    def runs(self) -> bool:
        return not self.problem

    @property
    def verdict(self) -> str:
        """One sentence: does it fit?"""
        if self.typical is None:
            return f"does not run: {self.problem}"
        layout = self.typical.layout
        if layout.needs_disk:
            share = layout.only_on_disk / layout.all_experts
            return f"runs, but {share:.0%} of the experts are read from disk when needed"
        if self.hardware.gpu is None:
            return "fits in RAM"
        if not layout.on_gpu:
            return "fits in RAM; the GPU is too small for the dense weights and helps nothing"
        if layout.vram_experts >= layout.all_experts:
            return "fits on the GPU"
        return f"fits: {layout.vram_experts / layout.all_experts:.0%} of the experts on the GPU"

    def as_dict(self) -> dict[str, Any]:
        facts = {
            "simulated": True,
            "model": self.model.name,
            "approximate": self.model.approximate,
            "hardware": self.hardware.as_dict(),
            "context": self.context,
            "prompt_tokens": self.prompt_tokens,
            "runs": self.runs,
            "verdict": self.verdict,
            "total_bytes": self.model.total,
            "expert_bytes": max(self.model.experts),
            "read_per_token_bytes": self.model.active_experts + sum(self.model.attention),
        }
        if self.typical is not None:
            facts |= {
                "tok_s": self.typical.tok_s,
                "tok_s_low": self.low,
                "tok_s_high": self.high,
                "forecast": self.typical.as_dict(),
            }
        return facts | {"steps": [asdict(step) for step in self.steps]}


def make_plan(
    model: ModelSizes,
    hardware: Hardware,
    *,
    context: int = 4096,
    prompt_tokens: int = 512,
    ram: int | None = None,
    policy: str = DEFAULT_POLICY,
    look_ahead: int = 1,
) -> Plan:
    """Forecast a model on a machine. `ram` is what the process may hold; default: 90 % of all."""
    context = min(context, model.context_length)
    num_tokens = min(96, max(16, ROUTED // (model.num_layers * model.top_k)))
    options: dict[str, Any] = {
        "context": context // 2, "prompt_tokens": min(prompt_tokens, context),
        "policy": policy, "look_ahead": look_ahead,
        "num_tokens": num_tokens, "warm_tokens": num_tokens,
    }  # fmt: skip

    def run(machine: Hardware, layout: Layout, **more: Any) -> Forecast:
        return forecast(model, machine, layout, **options, **more)

    try:
        layout = share_out(model, hardware, context, ram)
    except MemoryError as error:
        steps = tuple(_steps(model, hardware, context, ram, options, True))
        return Plan(model, hardware, context, prompt_tokens, str(error), steps=steps)
    typical = run(hardware, layout)
    low = run(_slower(hardware), layout, locality="weak").tok_s
    high = run(hardware, layout, locality="strong").tok_s
    return Plan(
        model, hardware, context, prompt_tokens, "", typical,
        low=min(low, typical.tok_s), high=max(high, typical.tok_s),
        steps=tuple(_steps(model, hardware, context, ram, options, layout.needs_disk)),
    )  # fmt: skip


def _steps(
    model: ModelSizes,
    hardware: Hardware,
    context: int,
    ram: int | None,
    options: dict[str, Any],
    needs_ram: bool,
) -> list[Step]:
    """One step more of each memory, as it is sold; none where it could not help any more."""
    found = []
    if needs_ram:
        more = next((step for step in RAM_STEPS if step > 1.05 * hardware.host.ram), None)
        if more:
            found.append(("ram", more, hardware.with_sizes(ram=more)))
    if hardware.gpu and hardware.gpu.room < model.total:
        more = next((step for step in VRAM_STEPS if step > 1.05 * hardware.gpu.vram), None)
        if more:
            found.append(("vram", more, hardware.with_sizes(vram=more)))
    steps = []
    for memory, nbytes, machine in found:
        try:
            layout = share_out(model, machine, context, ram if memory == "vram" else None)
        except MemoryError:
            steps.append(Step(memory, nbytes, None))
        else:
            steps.append(Step(memory, nbytes, forecast(model, machine, layout, **options).tok_s))
    return steps


def _slower(hardware: Hardware) -> Hardware:
    host, gpu = hardware.host, hardware.gpu
    host = replace(
        host,
        efficiency=SLOWER * host.efficiency,
        attention_efficiency=SLOWER * host.attention_efficiency,
    )
    if gpu is not None:
        gpu = replace(gpu, efficiency=SLOWER * gpu.efficiency, link=SLOWER * gpu.link)
    return replace(hardware, host=host, gpu=gpu)
