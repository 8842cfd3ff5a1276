"""Whether files still are what they were when their checksums were recorded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

PIECE = 8 << 20  # bytes that are read at a time

Progress = Callable[[int, int], None]  # bytes compared so far, bytes in all


def of_hub_cache(files: Iterable[Path]) -> dict[Path, str]:
    """The sha256 of those that lie in a cache of the Hugging Face hub, which names large files by
    it (blobs/SHA256; small ones by git's sha1, which are left out)."""
    found = {}
    for file in files:
        blob = file.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            found[file] = blob.name
    return found


def first_damaged(checksums: Mapping[Path, str], progress: Progress) -> Path | None:
    """Read the files whole; the first whose sha256 (hexadecimal) is another one."""
    total = sum(file.stat().st_size for file in checksums)
    done, piece = 0, memoryview(bytearray(PIECE))
    for file, expected in checksums.items():
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as opened:
            while count := opened.readinto(piece):
                digest.update(piece[:count])
                done += count
                progress(done, total)
        if digest.hexdigest() != expected:
            return file
    return None
