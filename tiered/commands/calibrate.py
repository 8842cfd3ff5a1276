"""tiered calibrate"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from tiered.commands import options as opt
from tiered.commands.info import facts_table
from tiered.commands.output import notes, print_json, results


@click.command("calibrate")
@opt.option(
    "--disk",
    "disk_folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder on the disk that models lie on. Default: the user's cache folder.",
)
@opt.option(
    "--device",
    default="auto",
    metavar="NAME",
    help="cpu; cuda, cuda:N, cuda:0,cuda:1 or cuda:all for GPUs as well; auto: all that are there.",
)
@opt.option("--threads", type=click.IntRange(1), help="Threads that compute. Default: all cores.")
@opt.json_option
def command(disk_folder: Path | None, device: str, threads: int | None, as_json: bool) -> None:
    """Measure this machine's memory, processor, disk and GPUs, in less than a minute and half a
    minute more for each further GPU, and keep that.

    `tiered info` shows what was measured; `tiered plan` takes the GPU's part from it, and a GPU's
    kernels are launched as it was found to be best. A file of 256 MB is written to the folder, and
    removed.
    """
    from tiered.backend import calibrate_gpu, has_gpu, numbered
    from tiered.gpu.devices import device_names
    from tiered.measuring.this_machine import (
        gpus_facts,
        host_facts,
        measure_host,
        save_host,
    )
    from tiered.user_cache import user_cache

    if not re.fullmatch(r"auto|cpu|cuda(:(\d+|all)|(:\d+)?(,cuda(:\d+)?)+)?", device):
        known = "cpu, cuda, cuda:N, several as cuda:0,cuda:1, cuda:all or auto"
        raise click.UsageError(f"--device is {known}, not {device!r}")
    with notes.status("measuring") as status:
        speed = measure_host(
            disk_folder or user_cache(),
            threads,
            lambda part: status.update(f"measuring this machine: {part}"),
        )
        save_host(speed)
        facts: dict[str, Any] = host_facts(speed)
        if device.startswith("cuda") or (device == "auto" and has_gpu()):
            cards = {}
            for name in numbered(device_names("cuda:all" if device == "auto" else device)):
                status.update(f"measuring this machine: {name}")
                where = "cuda:0" if name == "cuda" else name
                cards[where] = calibrate_gpu(where)
            facts |= gpus_facts(cards)
    if as_json:
        print_json(facts)
    else:
        results.print(facts_table(facts))
