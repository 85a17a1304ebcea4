"""Which metrics a run will log, and whether what a callback monitors is among them, known before any weights load."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.checks.run_length import RunLength, has_validation
from lit_distill.evaluation.held_out import metric_names as held_out_names
from lit_distill.objectives import metric_names as objective_names

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

OF_THE_RUN = ("loss", "step", "train/loss", "train/learning_rate", "train/skipped_steps")
HIDDEN = ("step", "train/skipped_steps")
HINTS: Mapping[str, str] = {
    r"val/(rouge_l|exact_match|response_length|unfinished|distinct_\d|repetition_4)": "Set generation.max_prompts.",
    r"val/(teacher_)?(ece|adaptive_ece|brier|accuracy)": "Set calibration.next_token: true.",
    r"val/judge_\w+": "List the callback Judge, with every_n_validations.",
    r"val/ex_acc_err_\d+": "Set exposure_bias.max_prompts and exposure_bias.every_n_validations.",
    r"val/(forward_kl|reverse_kl|top1_agreement|teacher_\w+)": "Set model.teacher.path.",
    r"rollout/(response_length|unfinished|repetition|tokens_per_second)": "Set model.source to one that generates.",
    r"rollout/(reward|\w+_entropy|teacher_share|reverse_kl_k[13]|effective_sample_size)|reverse_kl": (
        "Set model.source to one that scores its responses, such as TeacherMixedRollouts."
    ),
    r"test/.*": "A run of `fit` does not test; there are metrics under val/.",
}
"""What to do about a metric that a run can log and this one does not."""


class Logged(NamedTuple):
    """The metrics of a run."""

    names: frozenset[str]
    prefixes: tuple[str, ...]
    """How further names may begin, which only show while the run is going on."""
    complete: bool
    """Whether nobody else logs: callbacks of your own may, unless they have a method `metric_names`."""

    def __contains__(self, name: object) -> bool:
        return name in self.names or (isinstance(name, str) and name.startswith(self.prefixes))


def logged_metrics(module: DistillationModule) -> Logged:
    """What will be logged in the `fit` that is about to begin.

    A callback is asked by its method ``metric_names(trainer, module)``, if it has one.
    """
    trainer: Any = module.trainer
    names, prefixes, complete = set(OF_THE_RUN), ["lr-"], True
    for name, objective in module.all_objectives.items():
        names.add(f"train/{name}")
        further = objective_names(objective)
        names |= {f"train/{name}/{metric}" for metric in further or ()}
        prefixes += [] if further is not None else [f"train/{name}/"]
    names |= {f"rollout/{name}" for name in module.source.figures()}
    prefixes += [] if _is_ours(module.source) else ["rollout/"]
    if getattr(trainer.datamodule, "responses", True):
        held_out = held_out_names(dict(module.objectives.items()), module.teacher_spec is not None)
        names |= {f"val/{name}" for name in held_out}
    for callback in trainer.callbacks:
        if hasattr(callback, "metric_names"):
            names |= set(callback.metric_names(trainer, module))
        elif not _is_ours(callback) and (not _is_lightnings(callback) or isinstance(callback, LambdaCallback)):
            complete = False
    return Logged(frozenset(names), tuple(prefixes), complete)


def check_monitors(module: DistillationModule, length: RunLength | None) -> None:
    """Look at every callback that has a ``monitor``, such as `EarlyStopping`.

    Args:
        module: about to fit.
        length: of the run, if it is known.

    Raises:
        ValueError: naming the key, if the metric is never logged, or not before it is asked for.
    """
    trainer: Any = module.trainer
    logged = logged_metrics(module)
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or (isinstance(callback, EarlyStopping) and not callback.strict):
            continue
        key = (
            "checkpoint.monitor"
            if isinstance(callback, ModelCheckpoint)
            else f"trainer.callbacks: {_name(callback)}.monitor"
        )
        of_checkpoints = isinstance(callback, ModelCheckpoint) and monitor in ("epoch", "step")
        if monitor not in logged and logged.complete and not of_checkpoints:
            raise ValueError(f"{key}: {monitor} is not logged in this run. {_advice(monitor, logged.names)}")
        if monitor.startswith("val/") and not has_validation(trainer):
            raise ValueError(
                f"{key}: {monitor} is monitored, and there is no validation. Set data.init_args.validation or validation_size, and "
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
    return f"There are: {', '.join(sorted(set(names) - set(HIDDEN)))}."


def _name(callback: Callback) -> str:
    return type(callback).__name__


def _is_ours(part: object) -> bool:
    return type(part).__module__.startswith("lit_distill.")


def _is_lightnings(part: object) -> bool:
    return type(part).__module__.startswith("lightning.")
