"""The position of a checkpoint in its epoch, in a form from which Lightning resumes correctly.

Lightning counts an epoch as processed before ``on_train_epoch_end`` and ``on_train_end``, even if the run was stopped inside the
epoch. It interprets the counts of its loops differently after a batch, after a validation, at the end of an epoch, by steps and by
epochs, and in some of these cases skips an epoch or reads one batch too many. So only one form is used here: a saved checkpoint
contains how many batches of which epoch are done, and a loaded one always looks like a checkpoint written after a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EPOCHS = "epoch_progress"
BATCHES = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"
LOADERS = "combined_loader"


def save_position(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Correct the loop counts of a checkpoint that is being saved, so that they tell which batches were trained on.

    Args:
        trainer: the Trainer of the run.
        checkpoint: contains the state of its loops; changed in place.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batches, counts = _ready(loop), loop[BATCHES], loop[BATCHES]["current"]
    if _epoch_is_processed(loop) and not batches["is_last_batch"]:  # the run was stopped inside the epoch
        _set_epochs(loop, ready=epoch, processed=epoch - 1)
    elif batches["is_last_batch"] and counts["completed"] == counts["ready"] and not validation_was_due(trainer):
        # the validation came only from the stop; a resumed run must continue with the next batch instead
        _set_epochs(loop, ready=epoch, processed=epoch)
    loaders = getattr(trainer.fit_loop._combined_loader, "flattened", [])
    stateful = [loader for loader in loaders if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")]
    for loader, state in zip(stateful, loader_states(loop), strict=True):
        if hasattr(loader, "state_after") and counts["ready"] > counts["processed"]:  # the last batch raised an error
            state.update(loader.state_after(counts["processed"]))


def load_position(trainer: Any, checkpoint: dict[str, Any], again: int | None = None) -> None:
    """Change the loop counts of a checkpoint so that Lightning continues after the last batch that was trained on.

    Args:
        trainer: the Trainer, which has not loaded the state of its loops yet.
        checkpoint: contains that state; changed in place. It may be older than `save_position`.
        again: the number of a batch, counted over the run, that is read again if it was the last.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, validation = loop[BATCHES], loop[VALIDATION]
    here, in_all = batches["current"]["processed"], batches["total"]["processed"]
    back = int(again == in_all)
    over = batches["is_last_batch"] and here == batches["current"]["ready"]
    completed = batches["current"]["completed"] == here
    interrupted = validation["current"]["ready"] > validation["current"]["completed"]
    if over and completed and not _epoch_is_processed(loop) and not back:
        # only the end of the epoch and perhaps a validation are left, which Lightning handles correctly
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = in_all - 1
        _set_validation(validation, repeat=interrupted)
        return
    epoch, here, in_all = max(0, _ready(loop) - 1), here - back, in_all - back
    for state in loader_states(loop) if back else ():
        state.update(state.get("before", {}))
    if over and not back:
        epoch, here = epoch + 1, 0
    elif here:
        here = _in_current_batches(trainer, loader_states(loop), here)
    # an epoch without any batch has not started yet, so its start hooks are called
    _set_epochs(loop, ready=epoch + 1, processed=epoch, started=epoch + (here > 0))
    batches["current"] = _counts(here, completed=here - 1)
    batches["total"] = _counts(in_all, completed=in_all - 1)
    batches["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = in_all - 1
    _set_validation(validation, repeat=bool(here) and not back and (interrupted or not completed))


def batches_of_run(trainer: Any) -> int:
    """Lightning's ``estimated_stepping_batches``.

    To compute it, Lightning creates and keeps the training loader; it is removed again, since a resumed run has to load its state
    into a new one.
    """
    loop = trainer.fit_loop
    unread = loop._combined_loader is None
    batches = int(trainer.estimated_stepping_batches)
    if unread:
        loop._combined_loader = None
    return batches


def loader_states(fit_loop: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The states of the training loaders that have one."""
    states: list[dict[str, Any]] = fit_loop.get("state_dict", {}).get(LOADERS, [])
    return states


def validation_was_due(trainer: Any) -> bool:
    """Whether the validation that has just run was due at this batch.

    Lightning also validates when a run is stopped; a resumed run must not count that validation.
    """
    if not trainer.should_stop:
        return True
    trainer.should_stop = False
    try:
        return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
    finally:
        trainer.should_stop = True


def _in_current_batches(trainer: Any, states: list[dict[str, Any]], batches: int) -> int:
    """Convert a number of finished batches to the current batch size; at least one batch of the epoch is left."""
    data = trainer.datamodule
    orders = [state["order"] for state in states if "order" in state]
    names = ("batch_size", "tokens_per_batch")
    if len(orders) != 1 or all(getattr(data, name, orders[0].get(name)) == orders[0].get(name) for name in names):
        return batches
    loader, limit = data.train_dataloader(), trainer.limit_train_batches
    loader.load_state_dict(states[0])
    most = limit if isinstance(limit, int) else int(limit * len(loader))
    return max(0, min(loader.state_dict()["batches"], most - 1))


def _ready(fit_loop: Mapping[str, Any]) -> int:
    return int(fit_loop[EPOCHS]["total"]["ready"])


def _epoch_is_processed(fit_loop: Mapping[str, Any]) -> bool:
    """Whether the epoch that started last counts as processed."""
    return 0 < _ready(fit_loop) == fit_loop[EPOCHS]["total"]["processed"]


def _set_validation(progress: dict[str, Any], repeat: bool) -> None:
    """Set the counts so that Lightning runs a validation before the next training batch (``repeat``), or not."""
    done = progress["total"]["completed"]
    progress["current"] = _counts(0)
    progress["total"] = {**_counts(done + repeat), "processed": done, "completed": done}
    progress["is_last_batch"] = False


def _set_epochs(fit_loop: dict[str, Any], ready: int, processed: int, started: int | None = None) -> None:
    for counts in fit_loop[EPOCHS].values():
        counts.update(
            ready=ready, started=ready if started is None else started, processed=processed, completed=processed
        )


def _counts(number: int, completed: int | None = None) -> dict[str, int]:
    return {
        "ready": number,
        "started": number,
        "processed": number,
        "completed": number if completed is None else completed,
    }
