"""How long a prompt takes, in closed form, pass by pass. Simulated, never measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiered.budget import LONGEST_PASS
from tiered.planning.hardware import GB, Hardware
from tiered.planning.sizes import ModelSizes

if TYPE_CHECKING:
    from tiered.planning.forecast import Layout


def prompt_seconds(sizes: ModelSizes, hardware: Hardware, layout: Layout, num_tokens: int) -> float:
    """Seconds until the first token after a prompt.

    Each used expert is needed once per layer and pass (see tiered.chunks). On a GPU, those that
    are not there are streamed over the link or computed by the processor, whichever is sooner,
    while the GPU works.
    """
    done, total = 0, 0.0
    while done < num_tokens:
        count = min(LONGEST_PASS, num_tokens - done)
        total += _pass(sizes, hardware, layout, count, done)
        done += count
    return total


def distinct_experts(sizes: ModelSizes, num_tokens: int) -> float:
    """Experts of one layer that so many tokens use, if all are chosen alike."""
    return sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** num_tokens)


def _pass(sizes: ModelSizes, hardware: Hardware, layout: Layout, count: int, context: int) -> float:
    host, gpu, disk = hardware.host, hardware.gpu, hardware.disk
    cpu_flops, cpu_bytes = host.compute * GB, host.bandwidth * host.efficiency * GB
    if gpu:
        dense_flops = gpu.compute * 1e12 * gpu.compute_efficiency
        dense_bytes = gpu.bandwidth * gpu.efficiency * GB
    else:
        dense_flops, dense_bytes = cpu_flops, host.bandwidth * host.attention_efficiency * GB
    width, layers = sizes.attention_width, sizes.num_layers
    dense = 2 * count * sizes.dense_values / layers + 4 * count * width * (context + count / 2)
    used = distinct_experts(sizes, count) if sizes.num_experts else 0.0
    on_gpu = min(1.0, layout.vram_experts / max(1, layout.all_experts)) if gpu else 0.0
    from_disk = layout.only_on_disk / max(1, layout.all_experts)
    total = 0.0
    for attention, shared, blob in zip(sizes.attention, sizes.shared, sizes.experts, strict=True):
        total += max(dense / dense_flops, (attention + shared) / dense_bytes)
        if not blob:
            continue
        flops = 2 * count * sizes.top_k * sizes.expert_values
        reading = used * from_disk * (blob / (disk.bandwidth * GB))
        computing = max(flops / cpu_flops, used * blob / cpu_bytes)
        if gpu:
            here = max(flops * on_gpu / dense_flops, used * on_gpu * blob / dense_bytes)
            streamed = max(used * (1 - on_gpu) * blob / (gpu.link * GB), flops / dense_flops)
            computing = min(streamed, max(here, computing * (1 - on_gpu)))
        total += max(computing, reading) + host.overhead * 1e-6
    return total + max(2 * sizes.head_values / dense_flops, sizes.head / dense_bytes)
