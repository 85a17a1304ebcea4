"""Decoding, and the sources of text."""

from lit_distill.rollouts.decoding import Decoding, row_uniforms
from lit_distill.rollouts.loop import Responses, decode, decode_mixed
from lit_distill.rollouts.mixed import TeacherMixedRollouts
from lit_distill.rollouts.pairs import ResponsePairs
from lit_distill.rollouts.prediction import Prediction, prediction_records
from lit_distill.rollouts.replay import ReplayRollouts
from lit_distill.rollouts.sampled import StudentRollouts, TeacherRollouts
from lit_distill.rollouts.scoring import Scoring
from lit_distill.rollouts.sources import DatasetResponses, Players, Source, check_signals, share_out
from lit_distill.rollouts.trajectories import Trajectories
from lit_distill.rollouts.unfinished import UnfinishedPhase, phase_of

__all__ = [
    "DatasetResponses",
    "Decoding",
    "Players",
    "Prediction",
    "ReplayRollouts",
    "ResponsePairs",
    "Responses",
    "Scoring",
    "Source",
    "StudentRollouts",
    "TeacherMixedRollouts",
    "TeacherRollouts",
    "Trajectories",
    "UnfinishedPhase",
    "check_signals",
    "decode",
    "decode_mixed",
    "phase_of",
    "prediction_records",
    "row_uniforms",
    "share_out",
]
