"""Exposure bias on held-out prompts: the student's excess error on its own texts, compared with the teacher's texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.callbacks.figures import show_figure
from lit_distill.callbacks.prompt_evaluator import PromptEvaluator, Stage, generate_for_prompts
from lit_distill.evaluation.exposure_bias import (
    GENERATORS,
    STEP,
    AccumulatedErrors,
    StepKLMetric,
    step_errors,
    written_text,
)
from lit_distill.generation import SamplingParams
from lit_distill.report.figures import Curve, draw_accumulated_error
from lit_distill.types import ArgumentError, Batch, check_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_distill.module import DistillationModule


class ExposureBiasMonitor(PromptEvaluator):
    r"""Excess accumulated error at `test`: the curve as a figure, ``test/ex_acc_err_<l>`` in percent at chosen lengths l.

    With e_t = KL(p‖q) of token t, R(l) is the sum of the mean e_1 … e_l on texts that the student generated, l·ε(l) is the same on
    texts of the teacher, and ExAccErr(l) = (R(l) − l·ε(l)) / (l·ε(l)). Both generate at temperature 1 from the same random
    numbers: this does not change either mean, and it removes most of the noise from their difference. The first response token is
    counted. After the end of a text, e_t = 0; see `StepKLMetric`.

    Args:
        max_prompts: about how many prompts of a split, spread over it; 0 switches it off, -1 takes all. Both models generate.
        num_samples: texts of each model per prompt.
        max_new_tokens: longest text, and the curve's largest l.
        lengths: the l of the logged scalars; by default 8, 16, 32, … up to the longest text.
        seed: seed of the sampling; together with an item's id it fixes the texts.
        every_n_validations: run at every n-th validation too; by default at none.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543, section 3.3; MiniLLM's code leaves out the first token.
    """

    def __init__(
        self,
        max_prompts: int = 0,
        num_samples: int = 4,
        max_new_tokens: int = 128,
        lengths: list[int] | None = None,
        seed: int = 0,
        every_n_validations: int | None = None,
    ) -> None:
        super().__init__(max_prompts, every_n_validations)
        check_sizes(num_samples=num_samples)
        self.sampling = SamplingParams(max_new_tokens, temperature=1.0)
        powers = [2**n for n in range(3, max_new_tokens.bit_length()) if 2**n <= max_new_tokens] or [max_new_tokens]
        self.lengths = powers if lengths is None else lengths
        self.chosen = lengths is not None
        if not all(1 <= length <= max_new_tokens for length in self.lengths):
            raise ValueError(f"lengths: expected lengths from 1 to max_new_tokens ({max_new_tokens}), got {lengths}.")
        self.num_samples = num_samples
        self.seed = seed
        self._errors = StepKLMetric(max_new_tokens)
        self._report: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Refuse a run without a teacher, before any weights load."""
        if self.max_prompts and stage != "predict" and pl_module.teacher_spec is None:
            raise ArgumentError(
                self,
                f"max_prompts: {self.max_prompts}, but there is no teacher that can generate. "
                "Set model.teacher.path, or max_prompts: 0.",
            )

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a validation logs, if texts are long enough; does not need the weights."""
        return [f"val/ex_acc_err_{at}" for at in self.lengths] if self.max_prompts and self.every_n_validations else []

    def on_start(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Reset the results."""
        pl_module.over_ranks(self._errors).reset()
        self._report = {}

    def on_batch(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Generate with both models, and compute the student's KL at each token."""
        assert batch.prompts is not None
        teacher = pl_module.local_teacher
        assert teacher is not None
        for sample in range(self.num_samples):
            for generator in GENERATORS:
                with trainer.precision_plugin.val_step_context():
                    responses = generate_for_prompts(pl_module, batch, self.sampling, self.seed, generator, sample)
                    text = written_text(batch.prompts, responses)
                    for number, part in enumerate(pl_module.micro_batches(text)):
                        errors = step_errors(pl_module.student, teacher, part, pl_module.head_chunk_rows)
                        steps = part.signals[STEP][part.target_mask]
                        self._errors.update(generator, errors, steps, num_texts=0 if number else len(batch))

    def on_end(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Log the metrics over all ranks."""
        if not self._errors.update_called:
            return  # the split has no prompts
        found = self._errors.compute()
        if found is None:
            return
        reached = [length for length in self.lengths if length <= found.longest]
        beyond = [length for length in self.lengths if length > found.longest]
        if beyond and self.chosen:
            rank_zero_info(
                f"ExposureBiasMonitor.lengths: the longest text has {found.longest} tokens, so "
                f"nothing is logged at {', '.join(map(str, beyond))}."
            )
        pl_module.log_metrics_at_step(
            {f"{stage}/ex_acc_err_{at}": found.curves.excess[at - 1].float() for at in reached}
        )
        curves = {name: values[: found.longest].tolist() for name, values in found.curves._asdict().items()}
        show_figure(
            trainer, f"{stage}/exposure_bias", lambda figure: draw_errors(figure, **curves), pl_module.trained_steps
        )
        if stage == "test":
            self._report = {"exposure_bias": self._section(curves, found)}

    def _section(self, curves: dict[str, list[float]], found: AccumulatedErrors) -> dict[str, Any]:
        return {
            "lengths": list(range(1, found.longest + 1)),
            "ex_acc_err": _finite(curves["excess"]),
            "regret_student": _finite(curves["regret"]),
            "regret_teacher": _finite(curves["baseline"]),
            "num_prompts": found.num_texts // self.num_samples,
            "num_samples": self.num_samples,
        }

    def report(self) -> dict[str, Any]:
        """The curves of the last test, with None for values that are not finite; empty without a test."""
        return self._report


def draw_errors(figure: Figure, regret: list[float], baseline: list[float], excess: list[float]) -> None:
    """Draw the values at l = 1, 2, … on an empty figure: ExAccErr above, R and l·ε below."""
    draw_accumulated_error(
        figure,
        Curve("ExAccErr(l)", 1, list(enumerate(excess, start=1))),
        Curve("student's texts: R(l)", 1, list(enumerate(regret, start=1))),
        Curve("teacher's texts: l·ε(l)", 0, list(enumerate(baseline, start=1))),
    )


def _finite(values: list[float]) -> list[float | None]:
    """Replace NaN and infinity by None, since JSON has neither."""
    return [value if math.isfinite(value) else None for value in values]
