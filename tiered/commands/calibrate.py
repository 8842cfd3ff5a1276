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
    help="cpu; cuda or cuda:N for a GPU as well; auto: one that is there.",
)
@opt.option("--threads", type=click.IntRange(1), help="Threads that compute. Default: all cores.")
@opt.json_option
def command(disk_folder: Path | None, device: str, threads: int | None, as_json: bool) -> None:
    """Measure this machine's memory, processor, disk and GPU, in less than a minute, and keep that.

    `tiered info` shows what was measured; `tiered plan` takes the GPU's part from it, and a GPU's
    kernels are launched as it was found to be best. A file of 256 MB is written to the folder, and
    removed.
    """
    from tiered.backend import calibrate_gpu, has_gpu
    from tiered.measuring.this_machine import (
        gpu_facts,
        host_facts,
        measure_host,
        save_host,
    )
    from tiered.user_cache import user_cache

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise click.UsageError(f"--device is cpu, cuda, cuda:N or auto, not {device!r}")
    with notes.status("measuring") as status:
        speed = measure_host(
            disk_folder or user_cache(),
            threads,
            lambda part: status.update(f"measuring this machine: {part}"),
        )
        save_host(speed)
        facts: dict[str, Any] = host_facts(speed)
        if device.startswith("cuda") or (device == "auto" and has_gpu()):
            status.update("measuring this machine: GPU")
            facts |= gpu_facts(calibrate_gpu("cuda" if device == "auto" else device))
    if as_json:
        print_json(facts)
    else:
        results.print(facts_table(facts))
