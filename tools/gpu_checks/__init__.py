"""The checks of `tools/gpu_check.py`, one module per group."""
