"""Weights on their way from a checkpoint to the arithmetic: read, quantized, converted."""
