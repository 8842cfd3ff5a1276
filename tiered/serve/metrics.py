"""Numbers for Prometheus, in its text format."""

from __future__ import annotations

from tiered.kv_cache import PAGE_SIZE
from tiered.serve.counts import Histogram
from tiered.serve.service import Service


def exposition(service: Service) -> str:
    """All metrics, each with its type."""
    scheduler, engine = service.scheduler, service.engine
    counts, stats = scheduler.counts, engine.stats
    lines: list[str] = []

    def add(name: str, kind: str, value: float, labels: str = "") -> None:
        if not any(line.startswith(f"# TYPE tiered_{name} ") for line in lines):
            lines.append(f"# TYPE tiered_{name} {kind}")
        lines.append(f"tiered_{name}{labels} {value:g}")

    for reason, number in sorted(counts.finished.items()):
        add("requests_total", "counter", number, f'{{reason="{reason}"}}')
    add("requests_running", "gauge", len(scheduler.running))
    add("requests_waiting", "gauge", len(scheduler.waiting))
    add("prompt_tokens_total", "counter", counts.prompt_tokens)
    add("cached_prompt_tokens_total", "counter", counts.cached_tokens)
    add("generated_tokens_total", "counter", counts.new_tokens)
    add("drafted_tokens_total", "counter", counts.drafted)
    add("accepted_tokens_total", "counter", counts.drafted_right)
    add("preemptions_total", "counter", counts.preemptions)
    add("busy_seconds_total", "counter", counts.busy_seconds)
    add("expert_hits_total", "counter", stats.hits)
    add("expert_misses_total", "counter", stats.misses)
    add("expert_bytes_read_total", "counter", stats.bytes_read)
    add("prefetches_total", "counter", stats.prefetches)
    add("prefetches_used_total", "counter", stats.prefetches_used)
    add("experts_chosen_total", "counter", stats.chosen_experts)
    add("experts_dropped_total", "counter", stats.dropped_experts)
    add("kv_cache_tokens", "gauge", engine.kv.num_pages * PAGE_SIZE)
    add("kv_cache_free_tokens", "gauge", engine.kv.free_tokens)
    for part, seconds in stats.parts.items():
        add("part_seconds_total", "counter", seconds, f'{{part="{part}"}}')
    lines += histogram("first_token_seconds", counts.first_token_seconds)
    lines += histogram("request_seconds", counts.request_seconds)
    return "\n".join(lines) + "\n"


def histogram(name: str, values: Histogram) -> list[str]:
    lines, total = [f"# TYPE tiered_{name} histogram"], 0
    for bound, count in zip((*values.bounds, "+Inf"), values.counts, strict=True):
        total += count
        lines.append(f'tiered_{name}_bucket{{le="{bound}"}} {total}')
    return [*lines, f"tiered_{name}_sum {values.total:g}", f"tiered_{name}_count {total}"]
