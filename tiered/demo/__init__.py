"""The model of `tiered demo`: a small real one with experts, made on the user's machine."""

from tiered.demo.build import demo_model
from tiered.demo.download import DownloadError
from tiered.demo.random_model import random_tiny_model

__all__ = ["DownloadError", "demo_model", "random_tiny_model"]
