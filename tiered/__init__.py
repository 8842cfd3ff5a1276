"""Run Mixture-of-Experts language models that do not fit in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiered.version import __version__

if TYPE_CHECKING:
    from tiered.config import EngineConfig, ModelConfig
    from tiered.engine import Engine

__all__ = ["Engine", "EngineConfig", "ModelConfig", "__version__"]

_HOMES = {
    "Engine": "tiered.engine",
    "EngineConfig": "tiered.config",
    "ModelConfig": "tiered.config",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `tiered --help` and `info` are instant."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
