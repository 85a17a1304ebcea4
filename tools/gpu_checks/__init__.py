"""The checks of `tools/gpu_check.py`, a module for each subject."""
