"""The lines of a batch: one request each, in the form of OpenAI's batch files.

{"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 9}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

URLS = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"
MOST_NAMED = 5  # bad lines that an error names


class Line(NamedTuple):
    """A request. Its answer has the same `custom_id`."""

    custom_id: str
    url: str
    body: dict[str, Any]


def parse(data: bytes) -> Line:
    """A line; ValueError says what is wrong with it. Without a url, `messages` make it a chat."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("body"), dict):
        raise ValueError("it must be an object with a body, which is an object")
    custom_id, body = values.get("custom_id"), values["body"]
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be text, and not empty")
    url = values.get("url", URLS[0] if "messages" in body else URLS[1])
    if url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}, not {url!r}")
    if values.get("method", "POST") != "POST":
        raise ValueError("method must be POST")
    if body.get("stream"):
        raise ValueError("an answer in a file cannot be a stream")
    return Line(custom_id, url, body)


def read_lines(path: Path) -> Iterator[Line]:
    """The requests of a file that has been checked."""
    for _, data in _numbered(path):
        yield parse(data)


def check_lines(path: Path) -> list[str]:
    """The custom_ids, in order; ValueError names bad lines, before anything is computed."""
    first: dict[str, int] = {}
    bad = []
    for number, data in _numbered(path):
        try:
            custom_id = parse(data).custom_id
            if custom_id in first:
                raise ValueError(f"custom_id {custom_id!r} is that of line {first[custom_id]}, too")
            first[custom_id] = number
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise ValueError(f"{path}: {'; '.join(bad[:MOST_NAMED])}{more}")
    if not first:
        raise ValueError(f"{path} has no requests")
    return list(first)


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                yield number, data
