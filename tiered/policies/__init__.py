"""Eviction policies: one file each with a `class Policy`; the file's name is the policy's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from tiered.experts import ExpertKey

Evictable = Callable[[ExpertKey], bool]
NO_MIXES: Mapping[int, Sequence[int]] = {}


class Space(NamedTuple):
    """What a policy manages: `capacity` bytes, for blobs of `blob_bytes[layer]` bytes each.

    A dense layer has blobs of 0 bytes. Where a layer's experts differ, that is its largest, and
    `mixes[layer]` has each one's.
    """

    capacity: int
    blob_bytes: tuple[int, ...]
    mixes: Mapping[int, Sequence[int]] = NO_MIXES

    def nbytes(self, key: ExpertKey) -> int:
        """Of an expert's blob."""
        mix = self.mixes.get(key[0])
        return self.blob_bytes[key[0]] if mix is None else mix[key[1]]

    @property
    def average_bytes(self) -> list[float]:
        """Of a layer's experts, by layer."""
        averages: list[float] = list(self.blob_bytes)
        for layer, sizes in self.mixes.items():
            averages[layer] = sum(sizes) / len(sizes)
        return averages

    @property
    def num_layers(self) -> int:
        return len(self.blob_bytes)

    @property
    def num_sparse_layers(self) -> int:
        return sum(nbytes > 0 for nbytes in self.blob_bytes)

    @property
    def num_slots(self) -> int:
        """No more experts than this are ever resident."""
        smallest = min(chain(filter(None, self.blob_bytes), *self.mixes.values()))
        return self.capacity // smallest


class Policy(Protocol):
    """Chooses what to evict. Called by one thread at a time, in a deterministic order.

    `Policy(space)` is created once per tier. More methods are used where a policy has them:

    * `victim_for(key, evictable)` instead of `victim`: `key` is the expert that needs the room,
    * `insert(key)` instead of `touch`: `key` was loaded on a guess, nobody has used it yet,
    * `batch(keys)`: a layer demands these; comes before their touches and evictions,
    * `surplus(layer, excess, evictable)`: for the published way of counting, see replay.py.
    """

    def touch(self, key: ExpertKey) -> None:
        """`key` was just used: it was resident, or has just been given a slot."""

    def forget(self, key: ExpertKey) -> None:
        """`key` left the tier."""

    def victim(self, evictable: Evictable) -> ExpertKey | None:
        """The resident expert to evict, among those that `evictable` accepts; None: none of them.

        `forget` follows."""


def names() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def online() -> list[str]:
    """Those that need not know the future, which only a replay does."""
    return [name for name in names() if name != "belady"]


def create(policy: str | Callable[..., Policy], space: Space, **options: Any) -> Policy:
    """A policy by name ("lru"), from a file ("my_policy.py:Policy"), or by its class.

    `options` go to the class. Raises ValueError for an unknown name or a file without the class.
    """
    if not isinstance(policy, str):
        return policy(space, **options)
    if ".py" in policy:
        path, _, name = policy.partition(":")
        module, name = _load(Path(path)), name or "Policy"
    elif policy in names():
        module, name = import_module(f"{__name__}.{policy}"), "Policy"
    else:
        raise ValueError(
            f"unknown policy {policy!r}; choose one of {', '.join(names())}, "
            "or name a class of your own as path/to/file.py:Class"
        )
    if not hasattr(module, name):
        raise ValueError(f"{policy.partition(':')[0]} has no class {name!r}")
    made: Policy = getattr(module, name)(space, **options)
    return made


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is no Python file to take a policy from")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
