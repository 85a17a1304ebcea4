"""Compares the settings of a resumed run with those of its checkpoint: which changes take effect, and which are refused.

Settings without a state in the checkpoint take effect silently: more steps, validation, logging, callbacks, weights of objectives.
Optimiser and schedule continue from the checkpoint's state: a new value for the same class takes effect and is logged, another
class is refused. Other models or other data are refused, since they make another run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_distill.models.identity import identity_of, is_same_model
from lit_distill.optim import configure_optimizer

if TYPE_CHECKING:
    from lit_distill.resume.run import ResumableRun

Settings = Mapping[str, Any]
OPTIMIZER, SCHEDULER = "optimizer", "lr_scheduler"
NO_SETTING = {"params", "initial_lr", "base_lrs", "lr_lambdas", "last_epoch", "verbose"} | {
    "_step_count", "_last_lr", "_get_lr_called_within_step", "_initial_step", "_is_initial"
}  # fmt: skip
NEW_RUN = (
    "`fit` without ckpt_path from the exported student (model.student.path: export/last in the folder of that run)"
)

RESET = "Set checkpoint.reset_optimizer: true to start a new optimiser and learning-rate schedule from the checkpoint's weights"


class Change(NamedTuple):
    """A setting whose value differs from the checkpoint's."""

    key: str
    before: Any
    now: Any


def settings_of(run: ResumableRun, data: Any, total_steps: Callable[[], int]) -> dict[str, Any]:
    """The settings to compare when a run is resumed, as plain values.

    Args:
        run: the run; its optimiser need not exist yet.
        data: the data module, set up; one without a method ``content`` is not compared.
        total_steps: steps of the learning-rate schedule, for a scheduler that needs them.
    """
    frozen: dict[str, Any] = dict.fromkeys(("teacher", "reference"))
    frozen |= {key: teacher.identity(f"model.{key}") for key, teacher in run.frozen_configs.items()}
    return {
        "student": identity_of(run.student_spec, "model.student"),
        **frozen,
        "data": data.content("train") if hasattr(data, "content") else None,
        "source": run.source.description,
        "targets": run.targets and repr(run.targets),
        "objectives": {name: type(objective).__name__ for name, objective in run.all_objectives.items()},
        **_optimizer_settings(run, total_steps),
    }


def check_changes(then: Settings, now: Settings, fresh_optimizer: bool) -> None:
    """Refuse changed settings that cannot take effect.

    Args:
        then: settings of the run that wrote the checkpoint.
        now: settings of the resumed run.
        fresh_optimizer: whether the resumed run starts a new optimiser.

    Raises:
        ValueError: with the key, and what to do.
    """
    for role in ("student", "teacher", "reference"):
        before, here = then.get(role), now[role]  # older checkpoints know no reference
        if before and here and before.get("layers") != here.get("layers"):
            raise ValueError(
                f"model.{role}.keep_layers, drop_layers: {here['layers']}, but the checkpoint's {role} has {before['layers']}. To "
                f"resume, give those; for other layers, start {NEW_RUN}."
            )
        if before and here and not is_same_model(before, here):
            raise ValueError(
                f"model.{role}.path: {here['path']} is another model than the checkpoint's {role}, {before['path']}. To resume, "
                f"give that model; for another {role}, start {NEW_RUN}."
            )
    before, here = then["data"], now["data"]
    if before and here and any(before[name] and here[name] and before[name] != here[name] for name in before):
        raise ValueError(
            f"data: the run of the checkpoint trains on {_data(before)}, but this run has {_data(here)}, so its data position "
            f"is not valid here. To resume, give the same data; for other data, start {NEW_RUN}."
        )
    if not fresh_optimizer and (key := other_class(then, now)):
        names = [settings[key] and settings[key]["class"] for settings in (then, now)]
        raise ValueError(
            f"model.{key}: the checkpoint has the state of {names[0]}, and {names[1]} cannot continue from it. {RESET}, or give "
            "the class of the checkpoint."
        )


def check_state(groups: list[dict[str, Any]], run: ResumableRun) -> None:
    """Refuse the state of another optimiser if the checkpoint does not contain the class of its optimiser.

    Args:
        groups: parameter groups in the checkpoint.
        run: the resumed run.

    Raises:
        ValueError: with the key, and what to do.
    """
    optimizer, _ = _dummy_optimizer(run, len(groups), lambda: 1)
    stored, here = set(groups[0]) - NO_SETTING, set(optimizer.param_groups[0]) - NO_SETTING
    if stored - here and here - stored:  # new versions of torch only add options
        raise ValueError(
            f"model.{OPTIMIZER}: the checkpoint's optimiser has {', '.join(sorted(stored - here))}, and {_name(optimizer)} "
            f"cannot continue from it. {RESET}, or give the class of the checkpoint."
        )


def other_class(then: Settings, now: Settings) -> str | None:
    """The key of the optimiser or scheduler if its class has changed; otherwise None."""
    for key in (OPTIMIZER, SCHEDULER):
        if (then[key] and then[key]["class"]) != (now[key] and now[key]["class"]):
            return key
    return None


def changes_of_loss(then: Settings, now: Settings) -> Iterator[Change]:
    """What is learnt, from which texts and tokens, if it has changed. It takes effect on resume without a change of any state."""
    for key in ("source", "targets", "objectives"):
        if key in then and then[key] != now[key]:
            yield Change(f"model.{key}", *(_shown(settings[key]) for settings in (then, now)))


def changes(then: Settings, now: Settings) -> Iterator[Change]:
    """Changed options of an optimiser and a scheduler of the same class, which take effect on resume."""
    seen: set[str] = set()
    for key in (OPTIMIZER, SCHEDULER):
        for before, here in zip(then[key]["options"], now[key]["options"], strict=False) if then[key] else ():
            for name in before.keys() & here.keys():  # other versions of torch may have more options
                if before[name] != here[name] and name not in seen:
                    seen.add(name)
                    yield Change(f"model.{key}.{name}", before[name], here[name])


def apply_changes(checkpoint: dict[str, Any], run: ResumableRun, total_steps: Callable[[], int]) -> None:
    """Replace the options and the schedule's state in a checkpoint by those of the current settings at the same step.

    Args:
        checkpoint: changed in place, before it is loaded.
        run: the resumed run.
        total_steps: steps of the learning-rate schedule, for a scheduler that needs them.
    """
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    optimizer, scheduler = _dummy_optimizer(run, len(groups), total_steps)
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the optimiser has made no steps
            for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
    for group, here in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in here.items() if name != "params"})


def reset_optimizer_state(checkpoint: dict[str, Any], run: ResumableRun, total_steps: Callable[[], int]) -> None:
    """Remove the state of the optimiser from a checkpoint, and set the schedule to its start.

    Args:
        checkpoint: changed in place, before it is loaded.
        run: the resumed run.
        total_steps: steps of the learning-rate schedule, for a scheduler that needs them.
    """
    _, scheduler = _dummy_optimizer(run, 2, total_steps)
    state = scheduler.state_dict() if scheduler is not None else {}
    own = {name: value for name, value in state.items() if name not in ("base_lrs", "_last_lr")}
    checkpoint |= {"optimizer_states": [], "lr_schedulers": [own] if own else []}


def _dummy_optimizer(
    run: ResumableRun, num_groups: int, total_steps: Callable[[], int]
) -> tuple[Optimizer, LRScheduler | None]:
    """Optimiser and scheduler with the run's settings, for a 2 x 2 linear layer."""
    parameters = nn.Linear(2, 2, bias=num_groups > 1).parameters()
    configured = configure_optimizer(run.optimizer_factory, run.lr_scheduler_factory, parameters, total_steps)
    return (
        (configured[OPTIMIZER], configured[SCHEDULER]["scheduler"])
        if isinstance(configured, dict)
        else (configured, None)
    )


def _optimizer_settings(run: ResumableRun, total_steps: Callable[[], int]) -> dict[str, Any]:
    optimizer, scheduler = _dummy_optimizer(run, 2, total_steps)
    groups = [{**group, "lr": group.get("initial_lr", group.get("lr"))} for group in optimizer.param_groups]
    return {
        OPTIMIZER: {"class": _name(optimizer), "options": [_plain(group) for group in groups]},
        SCHEDULER: scheduler and {"class": _name(scheduler), "options": [_plain(scheduler.state_dict())]},
    }


def _shown(value: Any) -> Any:
    return ", ".join(f"{name}: {kind}" for name, kind in value.items()) if isinstance(value, Mapping) else value


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _plain(value: Any) -> Any:
    """Convert to numbers, text, and lists and dictionaries of them."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if name not in NO_SETTING}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _data(content: Settings) -> str:
    corpus = content["corpus"]
    more = f" and {corpus['rows']} rows of {corpus['length']} tokens of corpus" if corpus else ""
    digest = f" (digest {content['ids'][:8]})" if content.get("ids") else ""  # older checkpoints have none
    return f"{content['items']} items of {content['tokens']} tokens{digest}{more}"
