"""Routing traces: recorded, read, and replayed."""
