"""The commands of `tiered`: one file each, with a click command of the file's name (- for _)."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import click

# What commands have in common.
_SHARED = {"calibration", "lists", "loading", "options", "output", "settings"}


def names() -> list[str]:
    modules = [module.name for module in iter_modules(__path__) if module.name not in _SHARED]
    return [name.replace("_", "-") for name in modules]


def find(name: str) -> click.Command:
    command: click.Command = import_module(f"{__name__}.{name.replace('-', '_')}").command
    return command
