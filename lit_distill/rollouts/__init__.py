"""Decoding, and the sources of text."""

from lit_distill.rollouts.decoding import Decoding, row_uniforms
from lit_distill.rollouts.loop import Responses, decode, decode_mixed
from lit_distill.rollouts.prediction import Prediction
from lit_distill.rollouts.sources import DatasetResponses, Source

__all__ = ["DatasetResponses", "Decoding", "Prediction", "Responses", "Source", "decode", "decode_mixed", "row_uniforms"]
