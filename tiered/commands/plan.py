"""tiered plan"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from tiered.commands import options as opt
from tiered.commands.output import notes, print_json, results
from tiered.config import DEFAULT_POLICY
from tiered.gpu.shares import parse_vram
from tiered.memory import default_limit, format_bytes, parse_bytes
from tiered.planning import hardware, shapes, sizes
from tiered.planning.hardware import Hardware
from tiered.planning.plan import Plan, make_plan
from tiered.planning.sizes import RECIPES, ModelSizes

TERMS = {
    "attention": "attention and other dense weights",
    "router": "router, starting, control",
    "shared": "shared experts, dense layers",
    "gpu_experts": "experts on the GPU",
    "cpu_experts": "experts on the processor",
    "link_wait": "waiting for copies to the GPU",
    "disk_wait": "waiting for the disk",
    "head": "output head",
}


@click.command("plan")
@click.argument("model")
@opt.option(
    "--gpu",
    "gpu",
    metavar="NAME",
    help="A described machine: "
    f"{', '.join(hardware.names())}; or FILE.toml. Several, as rtx4090,rtx3060-12gb, share the "
    "layers in the first one's machine; cuda:0,cuda:1 are those of this one. Default: this "
    "machine, measured, with the first GPU that `tiered calibrate` found.",
)
@opt.option("--ram", metavar="SIZE", help="Memory of the machine, as 32G.")
@opt.option(
    "--vram", metavar="SIZE", help="Memory of the GPU, as 16G; of several, each one's, or 16G,8G."
)
@opt.option(
    "--quant",
    type=click.Choice(list(RECIPES)),
    default="q4_0",
    help="Number formats of a known model; a file has its own.",
)
@opt.option("--context", type=click.IntRange(1), default=4096, help="Tokens of context to keep.")
@opt.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=512,
    help="Tokens of prompt, for the time to first token.",
)
@opt.option(
    "--kv-dtype",
    type=click.Choice(["f16", "int8", "f32"]),
    default="f16",
    help="Precision of the KV cache.",
)
@opt.option("--policy", default=DEFAULT_POLICY, metavar="NAME", help="Eviction policy.")
@opt.option("--look-ahead", type=click.IntRange(0, 3), default=1, help="Layers; 0: off.")
@opt.option("--threads", type=click.IntRange(1), help="Threads that compute, on this machine.")
@opt.json_option
def command(
    model: str,
    gpu: str | None,
    ram: str | None,
    vram: str | None,
    quant: str,
    kv_dtype: str,
    threads: int | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Tell whether MODEL fits, how fast it would be, and what more memory would buy.

    MODEL is a file or folder, of which only headers are read, or the name of a known model, of
    which nothing is needed: mixtral-8x7b, qwen3-30b-a3b, ... The answer is a simulation.
    """
    described = describe(model, quant, kv_dtype)
    limit = None
    if gpu is None or gpu.startswith("cuda"):
        machines = measured_with_cards(Path(model), described, quant, threads, gpu)
        if vram is not None and machines[0].gpu is None:
            raise click.UsageError("--vram needs --gpu, or a GPU that `tiered calibrate` measured")
        limit = parse_bytes(ram) if ram else default_limit()
    else:
        machines = [hardware.find(name.strip()) for name in gpu.split(",")]
    machine = together(machines, vram)
    if (size := limit or (parse_bytes(ram) if ram else None)) is not None:
        machine = machine.with_sizes(ram=size)
    plan = make_plan(described, machine, ram=limit, **choices)
    if as_json:
        print_json(plan.as_dict())
    else:
        show(plan)


def describe(model: str, quant: str, kv_dtype: str) -> ModelSizes:
    """The sizes of a file, or of a known model."""
    path = Path(model)
    if not path.exists():
        return sizes.of_shape(shapes.find(model), quant, kv_dtype)
    from tiered.formats import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        if not checkpoint.config.sparse_layers:
            raise ValueError(
                f"{path} has no experts: it needs {format_bytes(_size(path))} of memory"
            )
        return sizes.of_checkpoint(checkpoint, kv_dtype=kv_dtype)


def measured(path: Path, model: ModelSizes, quant: str, threads: int | None) -> Hardware:
    """This machine, with experts like the model's."""
    from tiered.experts import expert_layout
    from tiered.formats import open_checkpoint
    from tiered.measuring.measure import measure_machine
    from tiered.store import ExpertStore

    file: Path | None = None
    if path.exists():
        with open_checkpoint(path) as checkpoint, ExpertStore(checkpoint, readers=1) as store:
            config = checkpoint.config
            hidden, size = config.hidden_size, config.expert_size
            layout = store.layouts(config.sparse_layers[0]).layout(0)
            file = max((t.file for t in checkpoint.tensors.values()), key=_size)
    else:
        shape = shapes.find(path.name)
        hidden, size = shape.hidden_size, shape.expert_size
        kind = {"q4_k_m": "q4_k", "q5_k_m": "q5_k", "q6_k": "q6_k", "q8_0": "q8_0", "f16": "f16"}
        format = kind.get(quant, "q4_0")
        if format.endswith("_k") and (hidden % 256 or size % 256):
            format = "q4_0"
        layout = expert_layout(hidden, size, format, format, format)
    with notes.status("measuring this machine") as status:
        machine = measure_machine(
            layout, hidden, size, model.top_k, file, threads,
            progress=lambda part: status.update(f"measuring this machine: {part}"),
        )  # fmt: skip
    return machine


def measured_with_cards(
    path: Path, model: ModelSizes, quant: str, threads: int | None, names: str | None
) -> list[Hardware]:
    """This machine with each of the calibrated cards `names`; with the first, or none, by
    default."""
    from tiered.gpu.devices import device_names
    from tiered.measuring.this_machine import described_gpu, known_gpus

    known = known_gpus()
    wanted = list(known)[:1]
    if names is not None:
        wanted = list(known) if names == "cuda:all" else device_names(names)
        wanted = ["cuda:0" if name == "cuda" else name for name in wanted]
        if not wanted or not set(wanted) <= set(known):
            raise click.UsageError(
                f"--gpu {names}: `tiered calibrate --device {names}` has not measured that"
            )
    machine = measured(path, model, quant, threads)
    return [
        replace(
            machine,
            label=f"{machine.label}, {known[name]['device']}",
            gpu=described_gpu(known[name]),
        )
        for name in wanted
    ] or [machine]


def together(machines: list[Hardware], vram: str | None) -> Hardware:
    """The first machine, with the cards of all."""
    sizes = parse_vram(vram, len(machines))
    machines = [machine.with_sizes(vram=n) for machine, n in zip(machines, sizes, strict=True)]
    if len(machines) == 1:
        return machines[0]
    cards = [machine.gpu for machine in machines if machine.gpu is not None]
    if len(cards) < len(machines):
        without = next(machine for machine in machines if machine.gpu is None)
        raise click.UsageError(f"--gpu: {without.name} has no GPU")
    label = " and ".join(machine.label for machine in machines)
    return replace(machines[0], label=label, gpu=hardware.in_turn(cards))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size


def show(plan: Plan) -> None:
    model, machine, forecast = plan.model, plan.hardware, plan.typical
    about = " (approximate facts)" if model.approximate else ""
    results.print(f"[bold]{model.name}[/] on {machine.label}: {plan.verdict}{about}")
    results.print(
        f"{format_bytes(model.total)}: {format_bytes(model.dense)} dense, "
        f"{model.num_layers} layers with {model.num_experts} experts of "
        f"{format_bytes(max(model.experts))}, {model.top_k} for each token"
    )
    if forecast is not None:
        seconds = forecast.time_to_first_token
        results.print(
            f"[bold]{number(forecast.tok_s)} tokens/s[/] "
            f"({number(plan.low)} to {number(plan.high)}) after {plan.context // 2} tokens of "
            f"text, first token after {number(seconds)} s with a prompt of {plan.prompt_tokens}"
        )
        results.print(where(plan))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for term, value in forecast.terms.items():
            if value >= 0.005 / forecast.tok_s:
                table.add_row(TERMS[term], f"{1e3 * value:.1f} ms")
        results.print(table)
    for step in plan.steps:
        kind = {"ram": "RAM", "vram": "VRAM"}[step.memory]
        gain = "still too little" if step.tok_s is None else f"{number(step.tok_s)} tokens/s"
        results.print(f"with {step.nbytes >> 30} GiB of {kind}: {gain}")
    if plan.runs and not any(step.memory == "ram" for step in plan.steps):
        results.print("with more RAM: no faster, everything is in memory")
    results.print("simulated, not measured", style="dim")


def where(plan: Plan) -> str:
    """What goes where."""
    assert plan.typical is not None
    layout, parts = plan.typical.layout, []
    dense = f"dense weights and {format_bytes(layout.kv)} of KV cache"
    if layout.on_gpu:
        share = layout.vram_experts / max(1, layout.all_experts)
        parts.append(
            f"GPU: {dense}, {share:.0%} of the experts (hit rate {plan.typical.vram_hit_pct:.0f} %)"
        )
    share = layout.ram_experts / max(1, layout.all_experts)
    held = "all experts" if share == 1 else f"{share:.0%} of the experts"
    if layout.ram_experts < layout.all_experts:
        held += f" (hit rate with look-ahead {plan.typical.ram_hit_pct:.0f} %)"
    parts.append(f"RAM: {held}" if layout.on_gpu else f"RAM: {dense}, {held}")
    read = plan.typical.read_bytes_per_token / 1e6
    if layout.needs_disk or read >= 0.5:
        parts.append(f"disk: {read:.0f} MB read per token")
    return " · ".join(parts)


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"
