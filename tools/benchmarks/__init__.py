"""The rows of `tools/benchmark.py`, one module per subject."""
