"""Reading parts of a file into memory, past the page cache where the system can.

An expert in a slot should not be in the page cache, too. Direct reads (O_DIRECT) never enter it;
where they are not possible, ordinary reads are followed by a request to drop the pages.
"""

from __future__ import annotations

import errno
import os
import threading
from mmap import PAGESIZE, mmap
from pathlib import Path

import numpy as np

BLOCK = 4096  # direct reads need file offsets, sizes and addresses in multiples of this
CHUNK = 2 << 20  # bytes in one request: an expert matrix of most models fits

_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class FileReader:
    """Reads from one file; safe to use from several threads at once."""

    def __init__(self, file: Path, direct: bool = True) -> None:
        self.file = file
        self._buffered = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._buffered).st_size
        if hasattr(os, "posix_fadvise"):  # read-ahead would cache what nobody asked for
            os.posix_fadvise(self._buffered, 0, 0, os.POSIX_FADV_RANDOM)
        self._direct = _open_direct(file) if direct else None
        self._bounce = threading.local()
        self._seek = threading.Lock()

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    def read_into(self, offset: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, contiguous) from `offset`. OSError names the file and the place."""
        try:
            if self._direct is None or not self._read_direct(self._direct, offset, out):
                self._read_buffered(offset, out)
        except OSError as error:
            reason = f"{error.strerror or error} while reading {len(out)} bytes at {offset}"
            raise OSError(error.errno or errno.EIO, reason, str(self.file)) from error

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self._buffered, self._direct = -1, None

    def _read_direct(self, descriptor: int, offset: int, out: np.ndarray) -> bool:
        """False where the file system does not do direct reads after all."""
        position, end = offset, offset + len(out)
        while position < end:
            start = position // BLOCK * BLOCK
            target = out[position - offset :][:CHUNK]
            straight = start == position and _is_aligned(target) and len(target) >= BLOCK
            if straight:
                target = target[: len(target) // BLOCK * BLOCK]
                buffer = target
            else:  # through a buffer of whole blocks
                buffer = self._bounce_buffer()[: -(-end // BLOCK) * BLOCK - start]
            try:
                num_read = os.preadv(descriptor, [buffer.data], start)
            except OSError as error:
                if error.errno in _NOT_DIRECT and position == offset:
                    return False
                raise
            usable = min(start + num_read, end) - position
            if usable <= 0:
                raise _ends_early(position)
            if not straight:
                out[position - offset :][:usable] = buffer[position - start :][:usable]
            position += usable
        return True

    def _read_buffered(self, offset: int, out: np.ndarray) -> None:
        position, end = offset, offset + len(out)
        while position < end:
            num_read = self._pread(out.data[position - offset :][:CHUNK], position)
            if num_read <= 0:
                raise _ends_early(position)
            position += num_read
        if hasattr(os, "posix_fadvise"):
            start = offset // PAGESIZE * PAGESIZE  # pages that are only half in the range are kept
            size = -(-end // PAGESIZE) * PAGESIZE - start
            os.posix_fadvise(self._buffered, start, size, os.POSIX_FADV_DONTNEED)

    def _pread(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._buffered, [buffer], offset)
        with self._seek:  # Windows: the position belongs to the descriptor
            os.lseek(self._buffered, offset, os.SEEK_SET)
            data = os.read(self._buffered, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _bounce_buffer(self) -> np.ndarray:
        """This thread's page-aligned buffer of CHUNK bytes."""
        buffer: np.ndarray | None = getattr(self._bounce, "buffer", None)
        if buffer is None:
            buffer = self._bounce.buffer = np.frombuffer(mmap(-1, CHUNK), np.uint8)
        return buffer


def _open_direct(file: Path) -> int | None:
    if not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in _NOT_DIRECT:
            return None
        raise


def _is_aligned(array: np.ndarray) -> bool:
    return int(array.__array_interface__["data"][0]) % BLOCK == 0


def _ends_early(position: int) -> OSError:
    return OSError(errno.EIO, f"the file ends at or before byte {position}")
