"""Generation of responses: interfaces, sampling, the project's decode loop, engines, and the records that `predict` writes."""

from lit_distill.generation.base import DecodableModel, Engine, Generator
from lit_distill.generation.continuous import ContinuousBatching
from lit_distill.generation.decoder import Decoder, generate, generate_mixed
from lit_distill.generation.prediction import Prediction, prediction_records
from lit_distill.generation.sampling import SamplingParams, row_uniforms

__all__ = [
    "ContinuousBatching",
    "DecodableModel",
    "Decoder",
    "Engine",
    "Generator",
    "Prediction",
    "SamplingParams",
    "generate",
    "generate_mixed",
    "prediction_records",
    "row_uniforms",
]
