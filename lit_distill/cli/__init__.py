"""The command line: `lit-distill fit | validate | test | predict`."""

from lit_distill.cli.app import DistillCLI, main

__all__ = ["DistillCLI", "main"]
