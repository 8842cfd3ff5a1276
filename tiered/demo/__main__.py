"""The process that builds the demo's model: see tiered.demo.build.build_apart."""

from __future__ import annotations

import sys
from pathlib import Path

from tiered.demo.build import build
from tiered.formats import open_checkpoint


def show(doing: str, done: int, total: int) -> None:
    print(done, total, flush=True)


def main(dense: str, folder: str, num_experts: str, expert_size: str) -> None:
    with open_checkpoint(Path(dense)) as checkpoint:
        build(checkpoint, Path(folder), show, int(num_experts), int(expert_size))


if __name__ == "__main__":
    main(*sys.argv[1:])
