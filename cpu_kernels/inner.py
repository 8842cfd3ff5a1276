"""How functions are compiled that only other compiled functions call."""

from __future__ import annotations

from functools import partial

from numba import njit

# Without the wrappers that calls from Python and from C need, compiling takes a third less.
inner = partial(njit, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
