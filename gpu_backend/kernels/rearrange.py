"""Blocks to planes, after the copy: see gpu_backend.formats."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane_kernel(
    blocks, planes, num_blocks,
    OFFSET: tl.constexpr, NBYTES: tl.constexpr, BLOCK_BYTES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bytes OFFSET to OFFSET + NBYTES of every block, one block after the other.

    Both sides are uint8; `planes` is where this plane begins. Bytes are written in order, so that
    writes are wide and it is the reads, from cache lines that neighbours use, that are not.
    """
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = at < num_blocks * NBYTES
    block = at // NBYTES
    value = tl.load(blocks + block * BLOCK_BYTES + OFFSET + at % NBYTES, mask=inside, other=0)
    tl.store(planes + at, value, mask=inside)
