"""Arithmetic on the CPU, in Numba. Imports nothing of `tiered`.

`cpu_kernels.backend` has the whole of it; importing this package alone loads neither numba nor
anything else that is slow, so that `cpu_kernels.formats` is cheap to use.
"""
