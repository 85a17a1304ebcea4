"""Lightning callbacks of lit_distill; imported as `lit_distill.callbacks`."""

from lit_distill.callbacks.checkpoint import RunCheckpoint
from lit_distill.callbacks.comparison import BeforeAfter
from lit_distill.callbacks.export import HuggingFaceExport
from lit_distill.callbacks.generation import GenerationEvaluator
from lit_distill.callbacks.prediction import PredictionWriter
from lit_distill.callbacks.progress import RunProgress
from lit_distill.callbacks.rollouts import RolloutMonitor
from lit_distill.callbacks.schedules import ObjectiveWeightSchedule, TeacherMixSchedule

__all__ = [
    "BeforeAfter",
    "GenerationEvaluator",
    "HuggingFaceExport",
    "ObjectiveWeightSchedule",
    "PredictionWriter",
    "RolloutMonitor",
    "RunCheckpoint",
    "RunProgress",
    "TeacherMixSchedule",
]
