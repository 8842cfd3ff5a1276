"""Triton kernels. Each has its slow, exact twin of the same name in `gpu_backend.reference`."""
