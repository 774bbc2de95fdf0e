"""Benchmarks against the peers: ``python -m bench NAME``."""
