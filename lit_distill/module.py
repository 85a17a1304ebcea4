"""One LightningModule for every method: whose text (`source`), what is measured on it (`objectives`), how often (`source` again).

Optimisation is manual, since one batch may be worth many optimiser steps and one step many micro-batches; the Trainer's
gradient clipping is honoured all the same. Every objective's sum is divided by its count over all micro-batches and
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric

from lit_distill import checks
from lit_distill.continuation import load_run, save_run, scheduled_steps
from lit_distill.evaluation.held_out import HeldOut
from lit_distill.guards import NonFinite
from lit_distill.hooks import OwnHooks
from lit_distill.lengths import check_lengths, check_tokens
from lit_distill.models import (
    CausalLM,
    FrozenTeacher,
    Measurement,
    ModelSpec,
    build_pair,
    check_specs,
    global_counts,
    load_tokenizer,
    stop_token_ids,
)
from lit_distill.models.precision import avoid_cudnn_attention
from lit_distill.models.roles import device_and_precision, resolve_dtypes, warn_of_emulation
from lit_distill.models.routers import note_on_routers
from lit_distill.objectives import LossTerm, Objective, add_terms, term_means
from lit_distill.parallel import DataRanks, data_ranks, most_over_ranks, sharding_of, without_gradient_sync
from lit_distill.position import batches_of_run, validation_was_due
from lit_distill.rollouts import (
    DatasetResponses,
    Decoding,
    Players,
    Prediction,
    Responses,
    Source,
    UnfinishedPhase,
    check_signals,
    decode,
    phase_of,
    prediction_records,
    row_uniforms,
    share_out,
)
from lit_distill.schedulers import learning_rate, optimization
from lit_distill.types import Batch, Pairs, Prompts, Sequences

MetricType = TypeVar("MetricType", bound=Metric)
SELDOM = 100
"""Steps between two looks at the loss where trainer.log_every_n_steps: 0 asks for no logs."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DistillationModule(L.LightningModule):
    """A student that learns from texts, by objectives, beside a frozen teacher.

    Args:
        student: the model to train.
        objectives: what is measured on the source's text, by name; each has a ``weight``.
        teacher: the model to learn from; may be absent where no objective asks for it.
        source: whose text; the dataset's responses by default.
        corpus_objectives: what is measured on the plain text of ``data.init_args.corpus``.
        micro_batch_size: texts per forward pass and rank; the loss does not depend on it. All at once by default.
        head_chunk_rows: tokens whose logits exist at one time; by default 30 MB of them on a processor, 128 on a GPU.
        optimizer: AdamW by default; parameters of one dimension (norms, biases) get no weight decay.
        lr_scheduler: stepped after every optimiser step; none by default.
        prediction: what `predict` writes.
        on_nonfinite: what a NaN or infinite gradient does: stop the run, or skip the step and count it.

    Hooks:
        Any callback of the Trainer that has a method of one of these names gets to see, on every rank:
        ``on_rollouts(trainer, module, trajectories)``: what this rank has just rolled out, before it is learnt from.
        ``on_loss_terms(trainer, module, terms)``: after each optimiser step, ``[]`` tensors without graph, equal on all ranks:
        each objective's mean over the step's items, its metrics as ``objective/metric``, and their weighted sum ``loss``.

    Raises:
        ValueError: naming the key, if the objectives need what source and teacher do not provide.
    """

    student: CausalLM

    def __init__(
        self,
        student: ModelSpec,
        objectives: dict[str, Objective],
        teacher: ModelSpec | None = None,
        source: Source | None = None,
        corpus_objectives: dict[str, Objective] | None = None,
        micro_batch_size: int | None = None,
        head_chunk_rows: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        prediction: Prediction | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        checks.check_sizes(micro_batch_size=micro_batch_size, head_chunk_rows=head_chunk_rows)
        checks.check_names(objectives, corpus_objectives or {})
        check_specs(student, teacher)
        self.student_spec = student
        self.teacher_spec = teacher
        self.source = source or DatasetResponses()
        self.objectives: Mapping[str, Objective] = nn.ModuleDict(objectives)  # type: ignore[assignment]
        self.corpus_objectives: Mapping[str, Objective] = nn.ModuleDict(corpus_objectives or {})  # type: ignore[assignment]
        self.micro_batch_size = micro_batch_size
        self.head_chunk_rows = head_chunk_rows
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.prediction = prediction or Prediction()
        self.guard = NonFinite(on_nonfinite)
        self.hooks = OwnHooks()
        self.predicted_ids: frozenset[str] = frozenset()  # what an earlier, interrupted `predict` has written already
        self.teacher: FrozenTeacher | None = None
        self.unfinished: UnfinishedPhase | None = None
        self.optimizer_since = 0  # the optimiser step before its first
        self._loaded_steps = 0
        check_signals(self.source, objectives, corpus_objectives or {}, has_teacher=teacher is not None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, which is also the data's."""
        return load_tokenizer(self.student_spec, "model.student")

    def configure_model(self) -> None:
        """Load student and teacher; called by the Trainer once it knows the device and the strategy."""
        if hasattr(self, "student"):
            return
        device_type, precision = device_and_precision(self)
        avoid_cudnn_attention(device_type)
        self.student_spec, self.teacher_spec = resolve_dtypes(self.student_spec, self.teacher_spec, device_type)
        self.student, teacher = build_pair(self.student_spec, self.teacher_spec, self.tokenizer, sharding_of(self))
        warn_of_emulation(self.student, teacher, precision, device_type)
        self.teacher = FrozenTeacher(teacher, shared=teacher is self.student) if teacher else None
        self.stop_ids = stop_token_ids(self.tokenizer, self.student.model.generation_config)
        self._text = self._measurement(self.objectives, "model.objectives")
        self._corpus = self._measurement(self.corpus_objectives, "model.corpus_objectives")
        self.held_out = HeldOut(dict(self.objectives.items()), self.student, self.teacher, self.head_chunk_rows)

    @property
    def all_objectives(self) -> dict[str, Objective]:
        """The objectives on the source's text and those on the corpus, by name."""
        return {**dict(self.objectives.items()), **dict(self.corpus_objectives.items())}

    def _measurement(self, objectives: Mapping[str, Objective], key: str) -> Measurement:
        return Measurement(objectives, self.student, self.teacher, key, self.head_chunk_rows)

    def setup(self, stage: str) -> None:
        """Refuse Trainer options that would break a promise, before any weights load."""
        checks.check_strategy(self.trainer)
        if stage == "fit":
            checks.check_fit(self)
            self.automatic_optimization = False  # not before, or Lightning would refuse trainer.gradient_clip_val
        check_lengths(self, stage)
        check_tokens(self)

    def configure_optimizers(self) -> Any:
        """Optimiser and, where configured, a scheduler over the optimiser steps of the whole run."""
        steps = partial(scheduled_steps, self)
        return optimization(self.optimizer_factory, self.lr_scheduler_factory, self.parameters(), steps)

    @property
    def trained_steps(self) -> int:
        """Optimiser steps behind the student: of this run, or of the checkpoint that is looked at."""
        return self.global_step or self._loaded_steps

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, over all of its batches."""
        batch_size = getattr(self.trainer.datamodule, "batch_size", 1)  # type: ignore[attr-defined]
        steps = batches_of_run(self.trainer) * self.source.steps_per_batch(batch_size)
        return min(steps, self.trainer.max_steps) if self.trainer.max_steps > 0 else steps

    def on_fit_start(self) -> None:
        """Weights come from Hugging Face in evaluation mode; gradient checkpointing and dropout want the other."""
        self.student.train()
        if note := note_on_routers(self.student.config):
            rank_zero_info(note)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Every mini-batch that the source makes of ``batch`` is one optimiser step."""
        self.guard.ids = batch.ids
        phase = phase_of(batch, self.source, self._players(), self.unfinished, self.device)
        self.unfinished = None
        corpus = share_out(batch.corpus, phase.steps) if self.corpus_objectives else repeat(None, phase.steps)
        plain_texts = islice(corpus, phase.done, None)
        for done, (text, plain_text) in enumerate(zip(phase.texts, plain_texts, strict=False), start=phase.done + 1):
            self._optimize(text, plain_text)
            if self.global_step == self.trainer.max_steps:
                self.unfinished = UnfinishedPhase.of(phase, done, batches=self.trainer.fit_loop.total_batch_idx + 1)
                break

    def _players(self) -> Players:
        run = (self.stop_ids, self.global_step, self.total_steps, *self.data_ranks[:2])
        show = partial(self.hooks.call, self, "on_rollouts")
        return Players(self.student, self.teacher, *run, self.sum_over_ranks, show)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Raise what a callback has raised in the middle of the batch."""
        self.hooks.raise_kept()

    def _optimize(self, text: Sequences | Pairs, corpus: Sequences | None) -> None:
        # An objective whose weight is 0 does not run.
        weights = {name: objective.weight for name, objective in self.all_objectives.items() if objective.weight}
        streams = [(self._text, text)] if corpus is None else [(self._text, text), (self._corpus, corpus)]
        asked = [(measure, texts) for measure, texts in streams if weights.keys() & measure.objectives.keys()]
        parts = [(measure, part) for measure, texts in asked for part in self._micro_batches(texts)]
        counts = global_counts(parts, weights, self.sum_over_ranks)
        # A count of zero has a sum of zero; the factor only has to be finite. Gradients are averaged over ranks; ask for the sum.
        ranks = self.data_ranks.number
        factors = {name: weights[name] * ranks / counts[name].clamp(min=1).float() for name in counts}
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        terms: dict[str, LossTerm] = {}
        for i, (measure, part) in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else without_gradient_sync(self):
                loss, here = measure(part, {name: factors[name] for name in measure.objectives if name in factors})
                self.manual_backward(loss)
            terms |= {name: add_terms(terms[name], term) if name in terms else term for name, term in here.items()}
        self.guard.gate(self.parameters(), self.global_step + 1)
        if self.trainer.gradient_clip_val:
            self.clip_gradients(
                optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm or "norm"
            )
        optimizer.step()
        self._log_step(terms, counts, weights)
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def _micro_batches(self, text: Sequences | Pairs) -> list[Any]:
        size = self.micro_batch_size or len(text)
        parts: list[Any] = [text.rows(start, start + size) for start in range(0, len(text), size)]
        return parts + [text.rows(0, 1).uncounted()] * (most_over_ranks(self, len(parts)) - len(parts))

    @property
    def data_ranks(self) -> DataRanks:
        """Which share of every batch this rank has."""
        return data_ranks(self.trainer)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks that have different items, on all ranks."""
        summed: Tensor = self.trainer.strategy.reduce(values, group=self.data_ranks.group, reduce_op="sum")
        return summed

    def over_ranks(self, metric: MetricType) -> MetricType:
        """A torchmetrics metric that `sum_over_ranks` would agree with, on this rank's device."""
        metric.process_group = self.data_ranks.group
        return metric.to(self.device)

    def _log_step(
        self, terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> None:
        means = term_means(terms, counts, self.sum_over_ranks)
        figures = {f"train/{name}": mean for name, mean in means.items()}
        figures["train/loss"] = torch.stack([weights[name] * means[name] for name in terms]).sum()
        self.log("loss", figures["train/loss"], prog_bar=True, logger=False)
        optimizer: Any = self.optimizers()
        figures |= {f"train/{name}": rate for name, rate in learning_rate(optimizer).items()}
        figures |= {f"rollout/{name}": torch.tensor(value) for name, value in self.source.figures().items()}
        figures |= self.guard.figures()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = self.global_step == 1 or self.global_step % (every or SELDOM) == 0
        if due:
            self.guard.look(self, figures["train/loss"])
        self.record(figures, write=due and every > 0)
        self.hooks.call_after_step(self, {**means, "loss": figures["train/loss"]})

    def record(self, figures: Mapping[str, Tensor], write: bool = True) -> None:
        """Figures of training, equal on all ranks, for callbacks and, if ``write``, for the loggers at this optimiser step.

        One batch may hold many optimiser steps, of which Lightning's own `log` would keep the last.
        """
        self.log_dict(dict(figures), logger=False)
        if write:
            values = {name: float(value) for name, value in figures.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Token-level figures of the student on held-out responses."""
        if batch.sequences is None:
            return
        self.held_out.update(self._micro_batches(batch.sequences))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the figures of all ranks' batches under ``val/``; while fitting, the source may act on them."""
        figures = self._log_held_out("val")
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting and validation_was_due(self.trainer):
            self.source.observe_validation(figures)

    def on_test_epoch_end(self) -> None:
        """Log the figures of all ranks' batches under ``test/``."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> dict[str, Tensor]:
        if figures := self.held_out.figures():
            checks.check_finite(figures["perplexity"], f"{stage}/perplexity", self.global_step)
            self.log_figures({f"{stage}/{name}": value for name, value in figures.items()})
        return figures

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.over_ranks(self.held_out.means).reset()

    on_test_epoch_start = on_validation_epoch_start

    def log_figures(self, figures: Mapping[str, Tensor]) -> None:
        """Log figures that are equal on all ranks, at the optimiser step; Lightning would place them at the batch."""
        self.log_dict({**figures, "step": float(self.trained_steps)})

    def generate(
        self, prompts: Prompts, ids: tuple[str, ...], decoding: Decoding, seed: int = 0, speaker: str = "student"
    ) -> Responses:
        """Responses of student or teacher; each is fixed by ``seed`` and its item's id."""
        if speaker == "teacher" and self.teacher is None:
            raise ValueError("model.prediction.speaker: there is no teacher to speak. Set model.teacher.path.")
        who = self.teacher if speaker == "teacher" and self.teacher else self.student
        uniforms = None if decoding.temperature == 0 else row_uniforms(seed, ids, decoding.max_new_tokens)
        return decode(who, prompts, decoding, self.stop_ids, uniforms)

    def response_texts(self, responses: Responses) -> list[str]:
        """The responses as text, special tokens left out."""
        rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per item that no earlier run has written; see `prediction_records`."""
        assert batch.prompts is not None
        if not most_over_ranks(self, not self.predicted_ids.issuperset(batch.ids)):
            return []
        settings = self.prediction
        responses = self.generate(batch.prompts, batch.ids, settings, settings.seed, settings.speaker)
        texts = self.response_texts(responses)
        records = prediction_records(batch, responses, texts, self.stop_ids, settings, self.tokenizer)
        return [record for record in records if record["id"] not in self.predicted_ids]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a run needs to go on, and what it takes to rebuild the student without the run's YAML."""
        self.guard.look(self)
        save_run(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take that up; a checkpoint may be older than some of it, but not of another model."""
        load_run(self, checkpoint)
        self._loaded_steps = checkpoint["global_step"]
