"""A model of the hub without its weights: headers as they are, and holes in place of the rest.

Files have their full size and take no room on the disk, so that a checkpoint opens as it will when
it has been downloaded: what it is and what it needs can be told before.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tiered.checkpoints import gguf_header
from tiered.checkpoints.checkpoint import CheckpointError
from tiered.hub.download import Listing, Name, RemoteFile, read_start, repo_folder

GGUF_STARTS = (
    8 << 20,
    32 << 20,
    128 << 20,
)  # bytes: most headers are a vocabulary, and fit into 8 MiB
SAFETENSORS_START = 1 << 20
MAX_HEADER = 100_000_000  # bytes, as in formats/safetensors.py
# What a checkpoint's facts come from; its vocabulary is not needed.
NEEDED = re.compile(r"(\.gguf|\.safetensors|\.index\.json|(^|/)(generation_)?config\.json)$")
AT_ONCE = 8  # files whose headers are asked for at the same time


def make_skeleton(name: Name, listing: Listing, folder: Path) -> Path:
    """Make it in an empty folder; returns what an engine would open.

    Raises OSError if the hub or the disk fails, CheckpointError for a damaged header.
    """

    def make(file: RemoteFile) -> None:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = repo_folder(name) / "blobs" / file.digest
        if blob.is_file():  # downloaded already
            path.symlink_to(blob)
        elif path.suffix == ".gguf":
            _gguf(name, listing.commit, file, path)
        elif path.suffix == ".safetensors":
            _safetensors(name, listing.commit, file, path)
        else:
            _write(path, read_start(name, listing.commit, file, file.nbytes), file)

    wanted = [file for file in listing.files if NEEDED.search(file.name)]
    with ThreadPoolExecutor(AT_ONCE, "tiered-headers") as threads:
        for _ in threads.map(make, wanted):
            pass
    first = folder / listing.files[0].name
    return first if first.suffix == ".gguf" else folder


def _gguf(name: Name, commit: str, file: RemoteFile, path: Path) -> None:
    """Nothing says how long the header is: a longer start is asked for until it can be read."""
    for nbytes in GGUF_STARTS:
        _write(path, read_start(name, commit, file, nbytes), file)
        try:
            gguf_header.read_header(path)
            return
        except CheckpointError:
            if nbytes >= min(file.nbytes, GGUF_STARTS[-1]):
                raise


def _safetensors(name: Name, commit: str, file: RemoteFile, path: Path) -> None:
    data = read_start(name, commit, file, SAFETENSORS_START)
    length = int.from_bytes(data[:8], "little")
    if len(data) - 8 < length <= MAX_HEADER:
        data = read_start(name, commit, file, 8 + length)
    _write(path, data, file)


def _write(path: Path, start: bytes, file: RemoteFile) -> None:
    with path.open("wb") as out:
        out.write(start)
        out.truncate(file.nbytes)
