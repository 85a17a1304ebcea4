"""Settings that are others than those a checkpoint was written with: which take effect, and which cannot.

What is plainly read anew takes effect without a word: more steps, validation, logging, callbacks, weights of objectives. An
optimiser and its schedule go on from the checkpoint's state: a new value of the same class takes effect and is said, another
class cannot. Other models or other data are another run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_distill.models.identity import identity_of, is_same_model
from lit_distill.schedulers import optimization

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule

Settings = Mapping[str, Any]
OPTIMIZER, SCHEDULER = "optimizer", "lr_scheduler"
NO_SETTING = {"params", "initial_lr", "base_lrs", "lr_lambdas", "last_epoch", "verbose"} | {
    "_step_count", "_last_lr", "_get_lr_called_within_step", "_initial_step", "_is_initial"
}  # fmt: skip
NEW_RUN = (
    "`fit` without ckpt_path from the exported student (model.student.path: export/last in the folder of that run)"
)

AFRESH = "Set checkpoint.reset_optimizer: true to start optimiser and learning-rate schedule afresh from the checkpoint's weights"


class Change(NamedTuple):
    """A setting with another value than before."""

    key: str
    before: Any
    now: Any


def settings_of(module: DistillationModule, data: Any, total_steps: Callable[[], int]) -> dict[str, Any]:
    """Plain values of what a run that goes on is compared by.

    Args:
        module: whose optimiser need not be there yet.
        data: the data module, set up; one without ``content`` is not compared.
        total_steps: of the learning-rate schedule, for one that asks.
    """
    teacher = module.teacher_spec
    return {
        "student": identity_of(module.student_spec, "model.student"),
        "teacher": teacher and identity_of(teacher, "model.teacher"),
        "data": data.content("train") if hasattr(data, "content") else None,
        **_learning(module, total_steps),
    }


def check_changes(then: Settings, now: Settings, fresh_optimizer: bool) -> None:
    """Refuse what cannot take effect.

    Args:
        then: of the run that wrote the checkpoint.
        now: of the one that is to go on.
        fresh_optimizer: whether its optimiser starts afresh.

    Raises:
        ValueError: naming the key, and what to do.
    """
    for role in ("student", "teacher"):
        before, here = then[role], now[role]
        if before and here and not is_same_model(before, here):
            raise ValueError(
                f"model.{role}.path: {here['path']} is another model than the checkpoint's {role}, {before['path']}. To go on, "
                f"give that one; for another {role}, start {NEW_RUN}."
            )
    before, here = then["data"], now["data"]
    if before and here and any(before[name] and here[name] and before[name] != here[name] for name in before):
        raise ValueError(
            f"data: the run of the checkpoint learns from {_data(before)}, and here are {_data(here)}, in which its place means "
            f"nothing. To go on, give the same data; for others, start {NEW_RUN}."
        )
    if not fresh_optimizer and (key := other_class(then, now)):
        names = [settings[key] and settings[key]["class"] for settings in (then, now)]
        raise ValueError(
            f"model.{key}: the checkpoint has the state of {names[0]}, and {names[1]} cannot go on from it. {AFRESH}, or give the "
            "class that it had."
        )


def check_state(groups: list[dict[str, Any]], module: DistillationModule) -> None:
    """Refuse the state of another optimiser where the checkpoint does not say of which class it is.

    Args:
        groups: of parameters, in the checkpoint.
        module: with the settings.

    Raises:
        ValueError: naming the key, and what to do.
    """
    optimizer, _ = _practice(module, len(groups), lambda: 1)
    there, here = set(groups[0]) - NO_SETTING, set(optimizer.param_groups[0]) - NO_SETTING
    if there - here and here - there:  # not so between versions of torch, which only add some
        raise ValueError(
            f"model.{OPTIMIZER}: the checkpoint is of one with {', '.join(sorted(there - here))}, and {_name(optimizer)} "
            f"cannot go on from it. {AFRESH}, or give the class that it had."
        )


def other_class(then: Settings, now: Settings) -> str | None:
    """The key of an optimiser or a scheduler of another class."""
    for key in (OPTIMIZER, SCHEDULER):
        if (then[key] and then[key]["class"]) != (now[key] and now[key]["class"]):
            return key
    return None


def changes(then: Settings, now: Settings) -> Iterator[Change]:
    """Settings of an optimiser and a scheduler of the same classes that take effect in a run that goes on."""
    seen: set[str] = set()
    for key in (OPTIMIZER, SCHEDULER):
        for before, here in zip(then[key]["options"], now[key]["options"], strict=False) if then[key] else ():
            for name in before.keys() & here.keys():  # another version of torch may have more
                if before[name] != here[name] and name not in seen:
                    seen.add(name)
                    yield Change(f"model.{key}.{name}", before[name], here[name])


def take_effect(checkpoint: dict[str, Any], module: DistillationModule, total_steps: Callable[[], int]) -> None:
    """Write what the settings of now make of the optimiser and its schedule at their step into a checkpoint.

    Args:
        checkpoint: changed in place, before it is loaded.
        module: with the settings.
        total_steps: of the learning-rate schedule, for one that asks.
    """
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    optimizer, scheduler = _practice(module, len(groups), total_steps)
    if scheduler is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimiser's own steps are behind
            for _ in range(checkpoint["lr_schedulers"][0]["last_epoch"]):
                scheduler.step()
        checkpoint["lr_schedulers"] = [scheduler.state_dict()]
    for group, here in zip(groups, optimizer.param_groups, strict=True):
        group.update({name: value for name, value in here.items() if name != "params"})


def start_afresh(checkpoint: dict[str, Any], module: DistillationModule, total_steps: Callable[[], int]) -> None:
    """Take the state of optimiser and schedule out of a checkpoint.

    Args:
        checkpoint: changed in place, before it is loaded.
        module: with the settings.
        total_steps: of the learning-rate schedule, for one that asks.
    """
    _, scheduler = _practice(module, 2, total_steps)
    state = scheduler.state_dict() if scheduler is not None else {}
    own = {name: value for name, value in state.items() if name not in ("base_lrs", "_last_lr")}
    checkpoint |= {"optimizer_states": [], "lr_schedulers": [own] if own else []}


def _practice(
    module: DistillationModule, num_groups: int, total_steps: Callable[[], int]
) -> tuple[Optimizer, LRScheduler | None]:
    """Optimiser and scheduler as the run has them, of a model of two by two numbers."""
    parameters = nn.Linear(2, 2, bias=num_groups > 1).parameters()
    made = optimization(module.optimizer_factory, module.lr_scheduler_factory, parameters, total_steps)
    return (made[OPTIMIZER], made[SCHEDULER]["scheduler"]) if isinstance(made, dict) else (made, None)


def _learning(module: DistillationModule, total_steps: Callable[[], int]) -> dict[str, Any]:
    optimizer, scheduler = _practice(module, 2, total_steps)
    groups = [{**group, "lr": group.get("initial_lr", group.get("lr"))} for group in optimizer.param_groups]
    return {
        OPTIMIZER: {"class": _name(optimizer), "options": [_plain(group) for group in groups]},
        SCHEDULER: scheduler and {"class": _name(scheduler), "options": [_plain(scheduler.state_dict())]},
    }


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _plain(value: Any) -> Any:
    """Numbers, text, and lists and dictionaries of them."""
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
    return f"{content['items']} items of {content['tokens']} tokens{more}"
