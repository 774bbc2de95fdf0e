"""Measuring what training did, beside the baselines that could refute it."""
