"""Page-locks memory that is ours already, with CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

PORTABLE = 1  # cudaHostRegisterPortable: for all cards


class CudaPinner:
    """Registers ranges of memory, by the CUDA device of that index."""

    def __init__(self, index: int, forget_error: Callable[[], object]) -> None:
        """`forget_error` launches anything: what torch launches next reports an error that the
        runtime remembers, and thereby ends it."""
        self._index, self._forget_error = index, forget_error

    def pin(self, address: int, nbytes: int) -> bool:
        """False if the system refuses."""
        with torch.cuda.device(self._index):  # else, the first card gets a context for it
            runtime = torch.cuda.cudart()
            refused: bool = int(runtime.cudaHostRegister(address, nbytes, PORTABLE)) != 0
            if refused:
                with suppress(RuntimeError):
                    self._forget_error()
        return not refused

    def unpin(self, address: int) -> None:
        """Copies from there must have ended."""
        with torch.cuda.device(self._index):
            torch.cuda.cudart().cudaHostUnregister(address)
