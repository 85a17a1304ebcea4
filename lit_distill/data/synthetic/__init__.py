"""Synthetic tasks, generated from a seed: examples and tests need no files."""

from lit_distill.data.synthetic.data import GeneratedCorpus, ProceduralData

__all__ = ["GeneratedCorpus", "ProceduralData"]
