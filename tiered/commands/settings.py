"""Settings given as KEY=VALUE: options of a command for one of the models it opens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


def parse_settings(option: str, given: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Values of options `names` of the running command, checked as the options themselves are.

    `given` are texts like "quantize=none"; `option` is what they were given with, for errors.
    """
    context = click.get_current_context()
    parameters = [p for p in context.command.params if p.name in names]
    known = {name.lstrip("-"): p for p in parameters for name in p.opts}
    settings = {}
    for text in given:
        key, equals, value = text.partition("=")
        parameter = known.get(key.strip().lstrip("-").replace("_", "-"))
        if parameter is None or parameter.name is None or not equals:
            listed = ", ".join(known)
            raise click.UsageError(
                f"{option} takes KEY=VALUE, not {text!r}; the keys are: {listed}"
            )
        settings[parameter.name] = parameter.type.convert(value.strip(), parameter, context)
    return settings
