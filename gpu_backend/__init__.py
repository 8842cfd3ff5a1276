"""Arithmetic on a GPU, in torch and Triton: the twin of `cpu_kernels`. Imports nothing of `tiered`.

`gpu_backend.backend` has the whole of it. Importing this package alone loads neither torch nor
triton, so that `gpu_backend.formats` and `gpu_backend.slots` are cheap to use.

Numbers. Integer products are the CPU's: int8 activations in groups of 32 times integer weights, so
the sum of a group is exact. Their float combination has one order, written down in
`gpu_backend.reference` and followed bit by bit by every kernel here, in decode and prefill.
"""
