"""Measurements, each a ratio within one run: ``python -m mnv2_jax.bench --help``."""
