"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The user's cache folder for this package (see the XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tiered"


def machine_file() -> Path:
    """What `tiered calibrate` measured of the processor, its memory and a disk."""
    return user_cache() / "machine.json"


def gpu_file() -> Path:
    """... of a graphics card."""
    return user_cache() / "gpu.json"


def tuning_file() -> Path:
    """... of how the kernels of each graphics card are best launched."""
    return user_cache() / "gpu-tuning.json"
