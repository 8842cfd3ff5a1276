"""Results: rows of a long measurement in a CSV file, each written as soon as it is known.

A run that was stopped goes on where it ended: what the file has already is not done again.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ResultFile:
    """Rows with the given columns; the first `num_keys` of them say what was asked."""

    def __init__(self, path: Path | None, columns: Sequence[str], num_keys: int) -> None:
        self.path = path
        self.columns, self.num_keys = list(columns), num_keys
        self.rows: list[dict[str, str]] = []
        if path is not None and path.exists():
            self.rows = self._read(path)
        self._done = {self._key(row) for row in self.rows}

    def __contains__(self, point: dict[str, Any]) -> bool:
        return self._key(point) in self._done

    def find(self, point: dict[str, Any]) -> dict[str, str]:
        return next(row for row in self.rows if self._key(row) == self._key(point))

    def alike(self, point: dict[str, Any], but: str) -> list[dict[str, str]]:
        """Rows of points that differ from `point` in the column `but`, if in anything."""
        wanted = {**point, but: ""}
        return [row for row in self.rows if self._key({**row, but: ""}) == self._key(wanted)]

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row, also in the file."""
        text = {name: _text(row[name]) for name in self.columns}
        self.rows.append(text)
        self._done.add(self._key(text))
        if self.path is not None:
            is_new = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                if is_new:
                    writer.writeheader()
                writer.writerow(text)

    def _key(self, row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(_text(row[name]) for name in self.columns[: self.num_keys])

    def _read(self, path: Path) -> list[dict[str, str]]:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if list(reader.fieldnames or []) != self.columns:
                raise ValueError(
                    f"{path} has other columns than this command writes; give another --out, or "
                    "delete it"
                )
            rows = list(reader)
        whole = [row for row in rows if None not in row.values() and None not in row]
        if len(whole) < len(rows):  # stopped while it wrote a line
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(whole)
        return whole


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
