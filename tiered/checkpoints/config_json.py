"""ModelConfig as JSON and back, field by field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from functools import partial
from typing import Any

from tiered.checkpoints.facts import Facts
from tiered.config import (
    AttentionShape,
    DeltaConfig,
    LatentConfig,
    Mamba2Config,
    ModelConfig,
    RopeConfig,
)


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """An object for json.dumps; floats survive exactly."""
    values = asdict(config)
    return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in values.items()}


def config_from_json(facts: Facts) -> ModelConfig:
    """What `config_to_json` wrote; raises CheckpointError for anything else.

    A store made before a field was thought of has its default.
    """
    return ModelConfig(**_fields(ModelConfig, facts))


def _fields(kind: type, facts: Facts) -> dict[str, Any]:
    return {
        field.name: _READERS[str(field.type)](facts, field.name)
        for field in fields(kind)
        if field.name in facts or (field.default is MISSING and field.default_factory is MISSING)
    }


def _nested(kind: type, facts: Facts, name: str) -> Any:
    return kind(**_fields(kind, Facts(facts.mapping(name), facts.source)))


_READERS: dict[str, Callable[[Facts, str], Any]] = {
    "int": Facts.integer,
    "float": Facts.number,
    "str": Facts.text,
    "bool": Facts.flag,
    "tuple[int, ...]": Facts.integers,
    "tuple[float, ...]": Facts.numbers,
    "frozenset[int]": lambda facts, name: frozenset(facts.integers(name)),
    "RopeConfig": partial(_nested, RopeConfig),
    "LatentConfig": partial(_nested, LatentConfig),
    "DeltaConfig": partial(_nested, DeltaConfig),
    "Mamba2Config": partial(_nested, Mamba2Config),
    "AttentionShape | None": partial(_nested, AttentionShape),
}
