"""Fewer bits for a model's experts, chosen and rounded so that its answers change little."""
