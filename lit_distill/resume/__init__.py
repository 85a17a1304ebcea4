"""Exact resume: the state that a checkpoint has in addition to Lightning's, and how a resumed run restores it."""

from lit_distill.resume.hooks import CallbackHooks
from lit_distill.resume.position import batches_of_run, validation_was_due
from lit_distill.resume.state import check_continuation, load_run, save_run, scheduled_steps
from lit_distill.resume.unfinished import UnfinishedPhase, phase_of

__all__ = [
    "CallbackHooks",
    "UnfinishedPhase",
    "batches_of_run",
    "check_continuation",
    "load_run",
    "phase_of",
    "save_run",
    "scheduled_steps",
    "validation_was_due",
]
