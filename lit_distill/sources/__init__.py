"""Sources of training sequences: responses of the dataset, the student, the teacher, or a student-teacher mixture."""

from lit_distill.sources.advantages import AdvantageConfig
from lit_distill.sources.base import RolloutContext, Source, split_corpus
from lit_distill.sources.checks import check_signals, checked, uses_reference
from lit_distill.sources.dataset import DatasetResponses
from lit_distill.sources.mixed import TeacherMixedRollouts
from lit_distill.sources.pairs import ResponsePairs
from lit_distill.sources.replay import ReplayRollouts
from lit_distill.sources.rewards import Answer, Reward
from lit_distill.sources.sampled import StudentRollouts, TeacherRollouts
from lit_distill.sources.targets import TargetFilter

__all__ = [
    "AdvantageConfig",
    "Answer",
    "DatasetResponses",
    "ReplayRollouts",
    "ResponsePairs",
    "Reward",
    "RolloutContext",
    "Source",
    "StudentRollouts",
    "TargetFilter",
    "TeacherMixedRollouts",
    "TeacherRollouts",
    "check_signals",
    "checked",
    "split_corpus",
    "uses_reference",
]
