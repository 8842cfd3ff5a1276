"""Measurements: of this machine, of the kernels, of a model on both."""
