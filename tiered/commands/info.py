"""tiered info"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import bytes_progress, print_json, results
from tiered.config import QUANTIZATIONS
from tiered.memory import available_bytes, format_bytes


@click.command("info")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@opt.option(
    "--context", type=click.IntRange(1), default=4096, help="Tokens to size the KV cache for."
)
@opt.option(
    "--quantize",
    type=click.Choice(QUANTIZATIONS),
    default="int4",
    help="How a float checkpoint's experts would be held.",
)
@opt.option(
    "--device",
    metavar="sim:CARD",
    help="What of MODEL fits on a described card, or on several as sim:CARD,sim:CARD.",
)
@opt.option(
    "--check",
    is_flag=True,
    help="Read MODEL whole, and compare its files with the checksums that our stores and the cache "
    "of the Hugging Face hub have.",
)
@opt.json_option
def command(
    model: Path | None,
    context: int,
    quantize: str,
    device: str | None,
    check: bool,
    as_json: bool,
) -> None:
    """Tell what MODEL is and what fits where, from its headers; else, what this machine is."""
    if check and model is None:
        raise click.UsageError("--check needs a MODEL")
    facts = describe_model(model, context, quantize) if model else describe_machine()
    if check and model is not None:
        facts |= check_files(model)
    if device is not None:
        facts |= describe_cards(device, model, context, quantize)
    if as_json:
        print_json(facts)
        return
    results.print(facts_table(facts))


UNITS = {"_gb_s": "GB/s", "_gops": "GOPS", "_tflops": "TFLOP/s", "_usec": "µs"}


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, as people read them."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        label = name.replace("_bytes", "")
        for ending in UNITS:
            label = label.removesuffix(ending)
        table.add_row(label.replace("_", " "), present(name, value))
    return table


def present(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    for ending, unit in UNITS.items():
        if name.endswith(ending) and isinstance(value, dict):
            return ", ".join(f"{number:.4g} {unit} {key}" for key, number in value.items())
        if name.endswith(ending):
            return f"{value:.4g} {unit}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {present(name, item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def describe_machine() -> dict[str, Any]:
    """This machine, what `tiered` will use of it, and how fast it was measured to be."""
    import psutil

    from cpu_kernels import isa
    from tiered.backend import default_threads
    from tiered.measuring.this_machine import gpus_facts, host_facts, known_gpus, known_host
    from tiered.version import __version__

    facts = {
        "tiered": __version__,
        "threads": default_threads(),
        "kernels": isa.choose().name,
        "kernels_available": isa.available(),
        "amx": isa.amx_use(isa.choose()),
        "memory_bytes": psutil.virtual_memory().total,
        "free_for_us_bytes": available_bytes(),
    }
    speed, cards = known_host(), known_gpus()
    if speed is None:
        return facts | {"measured": "not yet: `tiered calibrate` does"}
    return facts | host_facts(speed) | gpus_facts(cards)


def describe_model(path: Path, context: int, quantize: str) -> dict[str, Any]:
    """The facts of a model, and what fits where on this machine."""
    from tiered import budget, kv_cache
    from tiered.formats import open_checkpoint
    from tiered.store import ExpertStore
    from tiered.weights.dense import dense_bytes

    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        context = min(context, config.context_length)
        facts: dict[str, Any] = {
            "model": str(path),
            "architecture": config.model_type,
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "vocabulary": config.vocab_size,
            "context_length": config.context_length,
            "experts": config.num_experts,
            "top_k": config.top_k,
        }
        formats = sorted({tensor.format for tensor in checkpoint.tensors.values()})
        dense = dense_bytes(checkpoint, quantize)
        kv = kv_cache.kv_bytes(config, context, "f16")
        work = budget.workspace_bytes(config, 512)
        facts |= {"formats": formats, "dense_bytes": dense, f"kv_cache_of_{context}_bytes": kv,
                  "workspace_bytes": work}  # fmt: skip
        if config.sparse_layers:
            with ExpertStore(checkpoint, quantize) as store:
                largest, experts = max(store.blob_bytes), sum(store.layer_bytes)
            of_token = experts * config.top_k // config.num_experts
            free = available_bytes()
            room = max(0, free - dense - kv - work)
            facts |= {
                "expert_bytes": largest,
                "experts_bytes": experts,
                "read_per_token_bytes": dense + of_token,
                "least_expert_ram_bytes": largest * config.top_k,
                "one_token_cycle_bytes": of_token,
                "free_for_us_bytes": free,
                "experts_in_memory": f"{min(1.0, room / experts):.0%}",
            }
        return facts


def check_files(path: Path) -> dict[str, Any]:
    """How many files have the checksums that were recorded. CheckpointError: one has not."""
    from tiered.formats import open_checkpoint

    with open_checkpoint(path) as checkpoint, bytes_progress() as bar:
        task = bar.add_task("comparing", total=None)
        count = checkpoint.verify(lambda done, total: bar.update(task, completed=done, total=total))
    return {"files_with_right_checksums": count or "none has a checksum: nothing was compared"}


def describe_cards(device: str, model: Path | None, context: int, quantize: str) -> dict[str, Any]:
    """Described cards, and which part of a model each would have."""
    from tiered.gpu.devices import described, device_names

    names = device_names(device)
    machines = [described(name) for name in names]
    facts: dict[str, Any] = {}
    for name, machine in zip(names, machines, strict=True):
        if machine is None or machine.gpu is None:
            raise click.UsageError(f"--device is a described card, as sim:rtx4090, not {name!r}")
        facts[name] = machine.label
        facts[f"{name}_usable_bytes"] = machine.gpu.room
    if model is not None:
        rooms = [machine.gpu.room for machine in machines if machine and machine.gpu]
        facts |= describe_shares(names, rooms, model, context, quantize)
    return facts


def describe_shares(
    names: list[str], rooms: list[int], model: Path, context: int, quantize: str
) -> dict[str, Any]:
    """The layers of each card, and how many of their experts it can hold."""
    from tiered.config import EngineConfig
    from tiered.formats import open_checkpoint
    from tiered.gpu.accelerator import model_bytes
    from tiered.gpu.shares import check_shares, share_out
    from tiered.store import ExpertStore

    facts: dict[str, Any] = {}
    with open_checkpoint(model) as checkpoint, ExpertStore(checkpoint, quantize) as store:
        choices = EngineConfig(quantize=quantize)
        context = min(context, checkpoint.config.context_length)
        sizes = model_bytes(checkpoint, store, choices, context, 1)
        shares = share_out(sizes, rooms)
        check_shares(sizes, shares, rooms, names)
        for name, room, share in zip(names, rooms, shares, strict=True):
            experts = sum(sizes.experts[layer] for layer in share.layers)
            facts[f"{name}_layers"] = f"{share.layers.start} to {share.layers.stop - 1}"
            facts[f"{name}_weights_bytes"] = share.fixed
            facts[f"{name}_kv_cache_bytes"] = share.kv
            left = [room - share.fixed, room - share.fixed - share.kv]
            facts[f"{name}_experts"] = {
                when: f"{min(1.0, nbytes / max(1, experts)):.0%}"
                for when, nbytes in zip(("at first", "with a full context"), left, strict=True)
            }
    return facts
