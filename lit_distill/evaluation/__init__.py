"""What is measured on held-out data: token-level quality and generated text."""

from lit_distill.evaluation.calibration import Calibration, CalibrationMetric
from lit_distill.evaluation.exposure_bias import StepErrors, step_errors, written_text
from lit_distill.evaluation.generation import ResponseScores
from lit_distill.evaluation.held_out import HeldOut
from lit_distill.evaluation.label_words import LabelWords, LabelWordTask
from lit_distill.evaluation.quality import AgreementQuality, StudentQuality, TermMeans
from lit_distill.evaluation.text import distinct_n, exact_match, repetition_rate, rouge_l

__all__ = [
    "AgreementQuality",
    "Calibration",
    "CalibrationMetric",
    "HeldOut",
    "LabelWordTask",
    "LabelWords",
    "ResponseScores",
    "StepErrors",
    "StudentQuality",
    "TermMeans",
    "distinct_n",
    "exact_match",
    "repetition_rate",
    "rouge_l",
    "step_errors",
    "written_text",
]
