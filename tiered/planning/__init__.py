"""Forecasts: a machine that exists as numbers only, and what a model would do on it."""
