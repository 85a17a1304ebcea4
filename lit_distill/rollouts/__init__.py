"""Decoding, and the sources of text."""

from lit_distill.rollouts.decoding import Decoding, Responses, decode, row_uniforms
from lit_distill.rollouts.prediction import Prediction
from lit_distill.rollouts.sources import DatasetResponses, Source

__all__ = ["DatasetResponses", "Decoding", "Prediction", "Responses", "Source", "decode", "row_uniforms"]
