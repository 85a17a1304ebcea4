"""Checks, before any weights load, that the run will log the metric that each callback monitors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.evaluation.token_metrics import metric_names as token_metric_names
from lit_distill.objectives import metric_names as objective_names
from lit_distill.validation.run_length import RunLength, has_validation

if TYPE_CHECKING:
    from lit_distill.validation.run import DistillationRun

GENERAL_METRICS = ("loss", "step", "train/loss", "train/learning_rate", "train/skipped_steps")
HIDDEN = ("step", "train/skipped_steps")
HINTS: Mapping[str, str] = {
    r"val/(rouge_l|exact_match|response_length|unfinished|distinct_\d|repetition_4)": "Set generation.max_prompts.",
    r"val/answer_accuracy": "Set generation.max_prompts and generation.checker.",
    r"val/(pass_at_\d+|mean_at_\d+|sampled_\w+)": (
        "Set on_policy.max_prompts; on_policy.k has the k of pass_at_<k>, on_policy.num_responses the n of mean_at_<n>."
    ),
    r"val/(top_k_overlap|on_policy_\w+)": (
        "Set on_policy.max_prompts, and model.teacher to one that answers for all tokens of generated texts."
    ),
    r"val/(teacher_)?(ece|adaptive_ece|brier|accuracy)": "Set calibration.next_token: true.",
    r"val/judge_\w+": "List the callback Judge, with every_n_validations.",
    r"val/ex_acc_err_\d+": "Set exposure_bias.max_prompts and exposure_bias.every_n_validations.",
    r"val/(forward_kl|reverse_kl|top1_agreement|teacher_\w+)": "Set model.teacher.path.",
    r"rollout/(response_length|unfinished|repetition|tokens_per_second)": "Set model.source to one that generates.",
    r"rollout/(reward|\w+_entropy|teacher_share|reverse_kl_k[13]|effective_sample_size)|reverse_kl": (
        "Set model.source to one that scores its responses, such as TeacherMixedRollouts."
    ),
    r"test/.*": "`fit` does not run the test; use a metric under val/.",
}
"""What to set so that the run logs a metric, by pattern."""


class Logged(NamedTuple):
    """The metrics that a run will log."""

    names: frozenset[str]
    prefixes: tuple[str, ...]
    """Prefixes of further metrics, whose full names are known only during the run."""
    complete: bool
    """False if a user's callback without a method `metric_names` may log other metrics."""

    def __contains__(self, name: object) -> bool:
        return name in self.names or (isinstance(name, str) and name.startswith(self.prefixes))


def logged_metrics(run: DistillationRun) -> Logged:
    """The metrics that this `fit` will log.

    Those of a callback come from its method ``metric_names(trainer, run)``, if it has one.
    """
    trainer: Any = run.trainer
    names, prefixes, complete = set(GENERAL_METRICS), ["lr-"], True
    for name, objective in run.all_objectives.items():
        names.add(f"train/{name}")
        further = objective_names(objective)
        names |= {f"train/{name}/{metric}" for metric in further or ()}
        prefixes += [] if further is not None else [f"train/{name}/"]
    names |= {f"rollout/{name}" for name in run.source.metrics()}
    prefixes += [] if _is_from_this_package(run.source) else ["rollout/"]
    if getattr(trainer.datamodule, "validates_responses", True):
        token_metrics = token_metric_names(dict(run.objectives.items()), run.teacher_config)
        names |= {f"val/{name}" for name in token_metrics}
    for callback in trainer.callbacks:
        if hasattr(callback, "metric_names"):
            names |= set(callback.metric_names(trainer, run))
        elif not _is_from_this_package(callback) and (
            not _is_from_lightning(callback) or isinstance(callback, LambdaCallback)
        ):
            complete = False
    return Logged(frozenset(names), tuple(prefixes), complete)


def check_monitors(run: DistillationRun, length: RunLength | None) -> None:
    """Check the metric of every callback that has a ``monitor``, such as `EarlyStopping`.

    Args:
        run: the run, before `fit`.
        length: its length, if known.

    Raises:
        ValueError: with the key, if the metric is never logged, or logged later than it is needed.
    """
    trainer: Any = run.trainer
    logged = logged_metrics(run)
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or (isinstance(callback, EarlyStopping) and not callback.strict):
            continue
        key = (
            "checkpoint.monitor"
            if isinstance(callback, ModelCheckpoint)
            else f"trainer.callbacks: {_name(callback)}.monitor"
        )
        is_checkpoint_counter = isinstance(callback, ModelCheckpoint) and monitor in ("epoch", "step")
        if monitor not in logged and logged.complete and not is_checkpoint_counter:
            raise ValueError(f"{key}: {monitor} is not logged in this run. {_advice(monitor, logged.names)}")
        if monitor.startswith("val/") and not has_validation(trainer):
            raise ValueError(
                f"{key}: {monitor} is monitored, but there is no validation. Set data.init_args.validation or validation_size, and "
                "trainer.limit_val_batches above 0."
            )
        if monitor.startswith("val/") and length is not None and not trainer.fast_dev_run:
            _check_in_time(callback, key, monitor, length)


def _check_in_time(callback: Callback, key: str, monitor: str, length: RunLength) -> None:
    first = f"the first validation comes after batch {length.first_validation:.0f}"
    if isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end:
        if length.first_validation > length.first_epoch_end:
            raise ValueError(
                f"{key}: {monitor} is read at the end of the first epoch, after batch {length.first_epoch_end:.0f}; {first}. "
                "Set trainer.val_check_interval to fewer batches, or remove the callback."
            )
    elif not length.validates:
        rank_zero_info(f"{key}: {monitor} is never read: {first}, and the run ends after batch {length.batches:.0f}.")


def _advice(monitor: str, names: Iterable[str]) -> str:
    for pattern, hint in HINTS.items():
        if re.fullmatch(pattern, monitor):
            return hint
    if close := get_close_matches(monitor, list(names), n=1, cutoff=0.8):
        return f"Did you mean {close[0]}?"
    return f"Metrics of this run: {', '.join(sorted(set(names) - set(HIDDEN)))}."


def _name(callback: Callback) -> str:
    return type(callback).__name__


def _is_from_this_package(part: object) -> bool:
    return type(part).__module__.startswith("lit_distill.")


def _is_from_lightning(part: object) -> bool:
    return type(part).__module__.startswith("lightning.")
