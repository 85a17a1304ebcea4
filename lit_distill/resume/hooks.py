"""The callback hooks that this project adds to Lightning's: ``on_rollouts`` and ``on_loss_terms``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule


class CallbackHooks:
    """Calls the hooks of all callbacks.

    An exception in ``on_loss_terms`` is raised only when the batch is complete, so that the run can be saved: in the middle of a
    batch there is no state from which it could resume. On several ranks it is raised at once, since the other ranks would wait.
    """

    def __init__(self) -> None:
        self._postponed: Exception | None = None

    def call(self, module: LightningModule, hook: str, value: Any) -> None:
        """Call the method ``hook`` with ``value`` on every callback of the Trainer that has it."""
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if method := getattr(callback, hook, None):
                method(module.trainer, module, value)

    def call_after_step(self, module: LightningModule, terms: Any) -> None:
        """Call ``on_loss_terms`` on every callback that has it, unless it has failed before in this batch."""
        if self._postponed is not None:
            return
        try:
            self.call(module, "on_loss_terms", terms)
        except Exception as error:
            if module.trainer.world_size > 1:
                raise
            self._postponed = error

    def raise_postponed(self) -> None:
        """At the end of a batch, raise the postponed exception, if there is one."""
        error, self._postponed = self._postponed, None
        if error is not None:
            raise error
