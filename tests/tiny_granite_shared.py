"""Granite with an expert that every token uses."""

from __future__ import annotations

from functools import partial
from typing import Any

import tiny_granite

add_layer = partial(tiny_granite.add_layer, shared=True)


def hf_config(s: dict[str, int]) -> dict[str, Any]:
    return tiny_granite.hf_config(s) | dict(shared_intermediate_size=s["shared_size"])


def write_metadata(writer: Any, s: dict[str, int]) -> None:
    tiny_granite.write_metadata(writer, s)
    writer.add_expert_shared_feed_forward_length(s["shared_size"])
