"""Lightning callbacks of lit_distill; imported as `lit_distill.callbacks`."""

from lit_distill.callbacks.before_after import BeforeAfter
from lit_distill.callbacks.calibration import CalibrationMonitor
from lit_distill.callbacks.checkpoint import RunCheckpoint
from lit_distill.callbacks.export import HuggingFaceExport
from lit_distill.callbacks.exposure_bias import ExposureBiasMonitor
from lit_distill.callbacks.generation import GenerationEvaluator
from lit_distill.callbacks.judge import Judge
from lit_distill.callbacks.on_policy import OnPolicyEvaluator
from lit_distill.callbacks.prediction import PredictionWriter
from lit_distill.callbacks.progress import RunProgress
from lit_distill.callbacks.recorder import RolloutRecorder
from lit_distill.callbacks.report import RunReport
from lit_distill.callbacks.rollout_monitor import RolloutMonitor
from lit_distill.callbacks.schedules import ObjectiveWeightSchedule, TeacherMixSchedule

__all__ = [
    "BeforeAfter",
    "CalibrationMonitor",
    "ExposureBiasMonitor",
    "GenerationEvaluator",
    "HuggingFaceExport",
    "Judge",
    "ObjectiveWeightSchedule",
    "OnPolicyEvaluator",
    "PredictionWriter",
    "RolloutMonitor",
    "RolloutRecorder",
    "RunCheckpoint",
    "RunProgress",
    "RunReport",
    "TeacherMixSchedule",
]
