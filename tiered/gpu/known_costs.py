"""What is known of costs when an engine starts: from `tiered calibrate`, or a description, and from
a few runs of the processor's kernels."""

from __future__ import annotations

from typing import Any

from tiered.experts import ExpertLayout
from tiered.measuring.this_machine import described_gpu, known_gpus
from tiered.planning.costs import Costs, Line
from tiered.planning.hardware import GB


def known_costs(card: Any, name: str, nbytes: int) -> Costs:
    """Of one card of a backend, called `name`, with experts of `nbytes`."""
    machine = card.device.machine
    if machine is not None:  # it is simulated
        described: Costs = machine.rates.costs(nbytes)
        return described
    costs, values = Costs.unknown(nbytes), known_gpus().get(name)
    if values is not None:
        gpu = described_gpu(values)
        reached = gpu.bandwidth * gpu.efficiency * GB
        costs.gpu = Line(2e-6 * gpu.launch, 1 / reached, nbytes)
        costs.link = Line(1e-6 * gpu.copy_latency, 1 / (gpu.link * GB), nbytes)
        costs.sync = 1e-6 * gpu.sync
    return costs


def measure_rows(card: Any, layer: Any, layout: ExpertLayout, costs: Costs) -> None:
    """Find out what the processor takes for further rows of activations, beside reading weights."""
    few = card.few_rows
    one, many = (card.host_seconds(layer, layout, num_rows) for num_rows in (1, few))
    costs.cpu = Line(
        costs.cpu.fixed, max(1e-15, one - costs.cpu.fixed) / layout.nbytes, layout.nbytes
    )
    costs.row = max(0.0, many - one) / ((few - 1) * layout.nbytes)
