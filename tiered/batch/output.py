"""The answers of a batch in a file, each written as soon as it is known.

A run that was killed goes on where it ended: what has an answer is not asked again. Answers that
only say that we failed (a status of 500 and more) do not count, and are taken out.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


class OutputFile:
    """Open for one run, which holds a lock on it; `done` are the custom_ids that have an answer.

    ValueError if the file is not an output of the batch with these custom_ids, OSError if another
    run writes to it.
    """

    def __init__(self, path: Path, ids: Collection[str]) -> None:
        self.path = path = path.resolve()  # what a link leads to is rewritten, not the link
        self.done: set[str] = set()
        self._file = _locked(path)
        try:
            self._read(frozenset(ids))
        except BaseException:
            self._file.close()
            raise

    def append(self, custom_id: str, status: int, body: dict[str, Any]) -> None:
        """Keep an answer: one write, so that only a killed process leaves a part of a line."""
        name = uuid.uuid4().hex[:24]
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        line = {
            "id": f"batch_req_{name}", "custom_id": custom_id, "response": response, "error": None,
        }  # fmt: skip
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self.done.add(custom_id)

    def close(self) -> None:
        """What was written is on the disk when this returns."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, ids: frozenset[str]) -> None:
        """Learn what is done; leave out a part of a line, and what must be asked again."""
        part = self.path.with_name(self.path.name + ".part")
        dropped = False
        with part.open("wb") as kept:
            for number, data in self._whole_lines():
                custom_id, status = self._parse(number, data, ids)
                if status < 500:
                    self.done.add(custom_id)
                    kept.write(data)
                else:
                    dropped = True
            dropped = dropped or kept.tell() < os.fstat(self._file.fileno()).st_size
        if not dropped:
            part.unlink()
            return
        os.replace(part, self.path)
        self._file.close()
        self._file = _locked(self.path)

    def _whole_lines(self) -> Iterator[tuple[int, bytes]]:
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            if data.endswith(b"\n"):
                yield number, data

    def _parse(self, number: int, data: bytes, ids: frozenset[str]) -> tuple[str, int]:
        try:
            line = json.loads(data)
            custom_id, status = line["custom_id"], line["response"]["status_code"]
            valid = custom_id in ids and custom_id not in self.done and type(status) is int
        except (ValueError, LookupError, TypeError):
            valid = False
        if not valid:
            raise ValueError(
                f"{self.path}, line {number}: this is no answer to a request of this batch that "
                "has none yet; give another file, or delete it"
            )
        return custom_id, status


def _locked(path: Path) -> Any:
    """The file, open for appending and reading; the lock ends when it is closed."""
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OSError(f"{path}: another run is writing to it") from None
    return file
