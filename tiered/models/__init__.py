"""Architectures: one file each, named after config.json's `model_type`.

A file has `GGUF_ARCHITECTURE` and `HAS_EXPERTS` (together they name it in GGUF), `HF_NAMES` and
`GGUF_NAMES` (its tensors, see tiered.checkpoints.tensor_names), `from_hf(facts)` and
`from_gguf(facts)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol, cast

from tiered.checkpoints.checkpoint import CheckpointError
from tiered.checkpoints.facts import Facts
from tiered.config import ModelConfig


class Architecture(Protocol):
    GGUF_ARCHITECTURE: str
    HAS_EXPERTS: bool
    HF_NAMES: Mapping[str, str]
    GGUF_NAMES: Mapping[str, str]

    def from_hf(self, facts: Facts) -> ModelConfig: ...

    def from_gguf(self, facts: Facts) -> ModelConfig: ...


def names() -> list[str]:
    return [module.name for module in iter_modules(__path__)]


def find(model_type: str, source: Path) -> Architecture:
    """The architecture that config.json calls `model_type`."""
    if model_type not in names():
        raise CheckpointError(
            f"{source}: unknown model_type {model_type!r}; known: {', '.join(names())}"
        )
    return cast(Architecture, import_module(f"{__name__}.{model_type}"))


def find_gguf(metadata: Mapping[str, Any], source: Path) -> tuple[Architecture, Facts]:
    """The architecture of a GGUF file, and its facts."""
    name = Facts(metadata, source).text("general.architecture")
    facts = Facts(metadata, source, name + ".")
    has_experts = facts.integer("expert_count", default=0) > 0
    known = [find(model_type, source) for model_type in names()]
    for architecture in known:
        if (name, has_experts) == (architecture.GGUF_ARCHITECTURE, architecture.HAS_EXPERTS):
            return architecture, facts
    listed = ", ".join(sorted({architecture.GGUF_ARCHITECTURE for architecture in known}))
    kind = "with" if has_experts else "without"
    raise CheckpointError(
        f"{source}: unknown architecture {name!r} {kind} experts; known: {listed}"
    )


def read_config(reader: Callable[[Facts], ModelConfig], facts: Facts) -> ModelConfig:
    """What `reader` (a from_hf or from_gguf) makes of the facts; nonsense names the file."""
    try:
        return reader(facts)
    except CheckpointError:
        raise
    except (ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{facts.source}: {error}") from error
