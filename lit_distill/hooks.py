"""The hooks of callbacks that Lightning does not know: ``on_rollouts`` and ``on_loss_terms``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


class OwnHooks:
    """Calls them.

    What ``on_loss_terms`` raises after an optimiser step is kept until the batch is complete, so that the run can be saved: in the
    middle of a batch there is no state from which it could go on. On several ranks it is raised at once, since the others would
    wait.
    """

    def __init__(self) -> None:
        self._raised: Exception | None = None

    def call(self, module: DistillationModule, hook: str, news: Any) -> None:
        """Show ``news`` to every callback of the Trainer that has a method ``hook``."""
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            if method := getattr(callback, hook, None):
                method(module.trainer, module, news)

    def call_after_step(self, module: DistillationModule, news: Any) -> None:
        """Show the loss terms of a step to every callback that has ``on_loss_terms``, until one has failed in this batch."""
        if self._raised is not None:
            return
        try:
            self.call(module, "on_loss_terms", news)
        except Exception as error:
            if module.trainer.world_size > 1:
                raise
            self._raised = error

    def raise_kept(self) -> None:
        """At the end of a batch, raise what was kept."""
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
