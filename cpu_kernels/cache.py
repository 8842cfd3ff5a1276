"""Where compiled kernels are kept, so that only the first start on a machine compiles.

Importing this module points Numba's cache at a folder of our own, whose name is a hash of the
kernels' sources, the processor's features and Numba's version: Numba itself does not notice that
a helper in another file changed. It also tells Numba the features that LLVM does not find out by
itself. Import it before anything that is decorated with `cache=True`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import llvmlite
import numba

from cpu_kernels.isa import features_for_llvm, host_features

VARIABLE = "TIERED_CACHE_DIR"


def cache_key() -> str:
    """Changes whenever compiled kernels must not be reused."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    features = sorted(name for name, present in host_features().items() if present)
    digest.update(repr((features, numba.__version__, llvmlite.__version__)).encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """An existing folder that we can write to: TIERED_CACHE_DIR, else the user's, else a temporary
    one, which the next start does not find again."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path("~").expanduser() / ".cache")
    base = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else user / "tiered"
    folder = base / f"kernels-{cache_key()}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="tiered-kernels-"))


FOLDER = cache_folder()
# The variables as well, because Numba reads them again when the environment has changed.
os.environ["NUMBA_CACHE_DIR"] = str(FOLDER)
numba.config.CACHE_DIR = str(FOLDER)
if numba.config.CPU_FEATURES is None and (FEATURES := features_for_llvm()):
    os.environ["NUMBA_CPU_FEATURES"] = numba.config.CPU_FEATURES = FEATURES


@contextmanager
def compiling() -> Iterator[None]:
    """Hold this while a function with `cache=True` is compiled or loaded.

    Two processes that start together take turns, and the second loads what the first compiled.
    Without it they could give the same file name to the code of two variants of one function.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
