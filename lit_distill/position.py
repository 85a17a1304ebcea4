"""Where in its epoch a checkpoint stands, written so that Lightning goes on there, whatever ended the run.

Lightning counts an epoch as processed before ``on_train_epoch_end`` and ``on_train_end``, also where the run was stopped inside
the epoch, and reads the counts of its loops in a dozen ways (after a batch, after a validation, at the end of an epoch, by steps
or by epochs), some of which skip an epoch or read a batch too many. So there is one way here: what is saved says how many
batches of which epoch are behind, and what is loaded says so in the form of a checkpoint written after a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EPOCHS = "epoch_progress"
BATCHES = "epoch_loop.batch_progress"
VALIDATION = "epoch_loop.val_loop.batch_progress"
LOADERS = "combined_loader"


def save_position(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint that is being saved say what was learnt from.

    Args:
        trainer: Lightning's.
        checkpoint: with the state of its loops, changed in place.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batches, counts = _ready(loop), loop[BATCHES], loop[BATCHES]["current"]
    if _counted(loop) and not batches["is_last_batch"]:  # the run was stopped inside the epoch
        _set_epochs(loop, ready=epoch, processed=epoch - 1)
    elif batches["is_last_batch"] and counts["completed"] == counts["ready"] and not validation_was_due(trainer):
        _set_epochs(
            loop, ready=epoch, processed=epoch
        )  # a run that goes on would look for a batch, not for this validation
    loaders = getattr(trainer.fit_loop._combined_loader, "flattened", [])
    stateful = [loader for loader in loaders if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")]
    for loader, state in zip(stateful, loader_states(loop), strict=True):
        if hasattr(loader, "state_after") and counts["ready"] > counts["processed"]:  # a batch that raised an error
            state.update(loader.state_after(counts["processed"]))


def load_position(trainer: Any, checkpoint: dict[str, Any], again: int | None = None) -> None:
    """Let Lightning go on with the batch after those that were learnt from.

    Args:
        trainer: Lightning's, which has not read the state of its loops yet.
        checkpoint: with that state, changed in place; also one from before `save_position`.
        again: the number, over the run, of a batch that is to be read again if it was the last.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, validation = loop[BATCHES], loop[VALIDATION]
    here, in_all = batches["current"]["processed"], batches["total"]["processed"]
    back = int(again == in_all)
    over = batches["is_last_batch"] and here == batches["current"]["ready"]
    completed = batches["current"]["completed"] == here
    begun = validation["current"]["ready"] > validation["current"]["completed"]
    if over and completed and not _counted(loop) and not back:
        # all that is left of the epoch is its end, and perhaps a validation: Lightning does as it should
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = in_all - 1
        _set_validation(validation, repeat=begun)
        return
    epoch, here, in_all = max(0, _ready(loop) - 1), here - back, in_all - back
    for state in loader_states(loop) if back else ():
        state.update(state.get("before", {}))
    if over and not back:
        epoch, here = epoch + 1, 0
    elif here:
        here = _in_batches_of_now(trainer, loader_states(loop), here)
    # an epoch of which nothing was read is one that is about to begin, and calls the hooks of its start
    _set_epochs(loop, ready=epoch + 1, processed=epoch, started=epoch + (here > 0))
    batches["current"] = _counts(here, completed=here - 1)
    batches["total"] = _counts(in_all, completed=in_all - 1)
    batches["is_last_batch"] = False
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = in_all - 1
    _set_validation(validation, repeat=bool(here) and not back and (begun or not completed))


def batches_of_run(trainer: Any) -> int:
    """Lightning's estimate, without the training loader that it keeps: a run that goes on has to load its state into it."""
    loop = trainer.fit_loop
    unread = loop._combined_loader is None
    batches = int(trainer.estimated_stepping_batches)
    if unread:
        loop._combined_loader = None
    return batches


def loader_states(fit_loop: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those of the training loaders that have any."""
    states: list[dict[str, Any]] = fit_loop.get("state_dict", {}).get(LOADERS, [])
    return states


def validation_was_due(trainer: Any) -> bool:
    """Whether the validation that has just run would have been there without a stop.

    Lightning validates where a run is told to stop, too; one that goes on from there must not remember it.
    """
    if not trainer.should_stop:
        return True
    trainer.should_stop = False
    try:
        return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))
    finally:
        trainer.should_stop = True


def _in_batches_of_now(trainer: Any, states: list[dict[str, Any]], batches: int) -> int:
    """How many of an epoch's batches are behind, if they have another size now; one is left in any case."""
    data = trainer.datamodule
    sizes = [state["order"]["batch_size"] for state in states if "order" in state]
    if len(sizes) != 1 or sizes[0] == getattr(data, "batch_size", sizes[0]):
        return batches
    loader, limit = data.train_dataloader(), trainer.limit_train_batches
    loader.load_state_dict(states[0])
    most = limit if isinstance(limit, int) else int(limit * len(loader))
    return max(0, min(loader.state_dict()["batches"], most - 1))


def _ready(fit_loop: Mapping[str, Any]) -> int:
    return int(fit_loop[EPOCHS]["total"]["ready"])


def _counted(fit_loop: Mapping[str, Any]) -> bool:
    """Whether the epoch that was begun last counts as processed."""
    return 0 < _ready(fit_loop) == fit_loop[EPOCHS]["total"]["processed"]


def _set_validation(progress: dict[str, Any], repeat: bool) -> None:
    """Let Lightning run a validation that is due after the last training batch, or not."""
    behind = progress["total"]["completed"]
    progress["current"] = _counts(0)
    progress["total"] = {**_counts(behind + repeat), "processed": behind, "completed": behind}
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
