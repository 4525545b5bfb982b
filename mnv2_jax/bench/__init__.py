"""Benchmarks: speed, compilation time, memory, input and TPU slices; see ``python -m mnv2_jax.bench --help``."""
