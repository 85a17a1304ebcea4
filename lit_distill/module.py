"""One LightningModule for every method: a `source` provides the sequences, `objectives` compute the losses on them.

Optimisation is manual, because one batch may give many optimiser steps and one step may have many micro-batches. The Trainer's
gradient clipping is applied nevertheless. The sum of every objective is divided by its count over all micro-batches and ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import Metric

from lit_distill import validation
from lit_distill.distributed import DataRanks, data_ranks, max_over_ranks, sharding_of, without_gradient_sync
from lit_distill.evaluation.token_metrics import TokenMetrics, compares
from lit_distill.generation import Engine, Generator, Prediction, SamplingParams, prediction_records
from lit_distill.generation.decoder import Decoder, ProgressHook
from lit_distill.losses import ObjectiveEvaluator, global_counts
from lit_distill.models import CausalLM, ModelSpec, load_tokenizer, stop_token_ids, validate_specs
from lit_distill.models.fixed_passes import check_fixed_passes
from lit_distill.models.identity import weights_digest
from lit_distill.models.precision import avoid_cudnn_attention, keep_freed_memory
from lit_distill.models.roles import check_graphs, device_and_precision, resolve_dtype, warn_of_emulation
from lit_distill.models.routers import note_on_routers
from lit_distill.objectives import LossTerm, Objective, add_terms, term_means
from lit_distill.optim import NonFiniteGradientGuard, configure_optimizer, learning_rate
from lit_distill.resume import (
    CallbackHooks,
    UnfinishedPhase,
    batches_of_run,
    load_run,
    phase_of,
    save_run,
    scheduled_steps,
    validation_was_due,
)
from lit_distill.sources import (
    DatasetResponses,
    RolloutContext,
    Source,
    TargetFilter,
    check_signals,
    split_corpus,
    uses_reference,
)
from lit_distill.teachers import (
    FrozenTeacher,
    LoadedTeacher,
    LocalTeacher,
    Teacher,
    as_teacher,
    load_models,
    walk,
)
from lit_distill.types import ArgumentError, Batch, Pairs, Prompts, Responses, Sequences, arguments_of, check_sizes

MetricType = TypeVar("MetricType", bound=Metric)
CHECK_EVERY = 100
"""Steps between two checks for a non-finite loss if trainer.log_every_n_steps: 0 turns logging off."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DistillationModule(L.LightningModule):
    """Trains a student with one or more objectives, usually against a frozen teacher.

    Args:
        student: the model to train.
        objectives: losses on the sequences of the source, by name; each has a ``weight``.
        teacher: the frozen model to distil, or another kind of `Teacher`; not needed if no objective uses it.
        source: provides the training sequences; the responses of the dataset by default.
        corpus_objectives: losses on the plain text of ``data.init_args.corpus``, by name.
        micro_batch_size: sequences per forward pass and rank; the loss does not depend on it. All at once by default.
        padding_free: put several texts into one row, without padding, if student and teacher keep them apart; the loss does not
            depend on it.
        head_chunk_rows: number of tokens whose logits are in memory at a time; by default 24 MB of logits on a CPU, 128 MB on a
            GPU.
        optimizer: AdamW by default; parameters with one dimension (norms, biases) get no weight decay.
        lr_scheduler: stepped after every optimiser step; none by default.
        generator: an engine that generates the responses of student and teacher, such as `ContinuousBatching`; by default the
            project's own decoder, which also generates wherever the teacher samples some of the tokens.
        reference: a second frozen model, for objectives that need one, such as `ReferenceKL`; often the student as it was at the
            start, by its path.
        targets: which tokens of the training texts are learnt; all tokens of the responses by default.
        prediction: settings of `predict`.
        on_nonfinite: what to do on a NaN or infinite gradient: stop the run, or skip the step and count it.

    Hooks:
        A callback of the Trainer may define these methods. They are called on every rank:
        ``on_rollouts(trainer, module, trajectories)``: with the rollouts that this rank has generated, before training on them.
        ``on_loss_terms(trainer, module, terms)``: after each optimiser step, with detached ``[]`` tensors, equal on all ranks:
        the mean of each objective over the items of the step, its metrics as ``objective/metric``, and the weighted sum ``loss``.

    Raises:
        ValueError: with the key, if the objectives need a signal that source and teacher do not provide.
    """

    student: CausalLM

    def __init__(
        self,
        student: ModelSpec,
        objectives: dict[str, Objective],
        teacher: Teacher | ModelSpec | None = None,
        source: Source | None = None,
        corpus_objectives: dict[str, Objective] | None = None,
        micro_batch_size: int | None = None,
        padding_free: bool = True,
        head_chunk_rows: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        generator: Engine | None = None,
        prediction: Prediction | None = None,
        reference: Teacher | ModelSpec | None = None,
        targets: TargetFilter | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        check_sizes(micro_batch_size=micro_batch_size, head_chunk_rows=head_chunk_rows)
        validation.check_names(objectives, corpus_objectives or {})
        validation.check_constructed(objectives, "objectives")
        validation.check_constructed(corpus_objectives or {}, "corpus_objectives")
        validate_specs(student, None)
        self.student_spec = student
        given = {"teacher": teacher, "reference": reference}
        self.frozen_configs: Mapping[str, Teacher] = {
            key: as_teacher(model) for key, model in given.items() if model is not None
        }
        for key, part in self._local_teachers():
            validate_specs(student, part.spec, key)
        self.source = source or DatasetResponses()
        self.objectives: Mapping[str, Objective] = nn.ModuleDict(objectives)  # type: ignore[assignment]
        self.corpus_objectives: Mapping[str, Objective] = nn.ModuleDict(corpus_objectives or {})  # type: ignore[assignment]
        self.micro_batch_size = micro_batch_size
        self.targets = targets
        self.padding_free = padding_free
        self.head_chunk_rows = head_chunk_rows
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.generator = generator
        self.prediction = prediction or Prediction()
        self.guard = NonFiniteGradientGuard(on_nonfinite)
        self.hooks = CallbackHooks()
        self.decoding_progress: ProgressHook | None = None  # for progress bars, see `Decoder`
        self.predicted: Mapping[str, str | None] = {}  # prompts by id, of what `predict` has written before
        self.teacher: LoadedTeacher | None = None
        self.reference: LoadedTeacher | None = None
        self.unfinished: UnfinishedPhase | None = None
        self.optimizer_since = 0  # optimiser steps done before this optimiser was created
        self._loaded_steps = 0
        self._empty: set[str] = set()  # objectives of which it was said that they counted nothing
        frozen = self.teacher_config, self.frozen_configs.get("reference")
        check_signals(self.source, objectives, corpus_objectives or {}, *frozen, targets)
        if reference is not None and not uses_reference(self.source, self.all_objectives.values()):
            self.frozen_configs = {key: model for key, model in self.frozen_configs.items() if key != "reference"}
            rank_zero_warn("model.reference: neither the source nor an objective uses it, so it is not loaded.")

    @property
    def teacher_config(self) -> Teacher | None:
        """The teacher as configured; None if there is none."""
        return self.frozen_configs.get("teacher")

    @property
    def item_fields(self) -> frozenset[str]:
        """The fields of the records that the data module adds to the items of every text."""
        return self.source.fields.union(*(teacher.fields for teacher in self.frozen_configs.values()))

    def _local_teachers(self) -> list[tuple[str, LocalTeacher]]:
        parts = [part for key, teacher in self.frozen_configs.items() for part in walk(teacher, key)]
        return [(key, part) for key, part in parts if isinstance(part, LocalTeacher)]

    @property
    def model_specs(self) -> dict[str, ModelSpec]:
        """All models of the run by their YAML key below ``model``: ``student``, and the local ones of teacher and reference."""
        return {"student": self.student_spec, **{key: part.spec for key, part in self._local_teachers()}}

    @property
    def teacher_spec(self) -> ModelSpec | None:
        """The teacher's model, if it is a local one that sees the student's texts, so that it can also generate."""
        return self.teacher_config.spec if isinstance(self.teacher_config, LocalTeacher) else None

    @property
    def local_teacher(self) -> FrozenTeacher | None:
        """The model of `teacher_spec`; None before it loads."""
        return self.teacher if isinstance(self.teacher, FrozenTeacher) else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer; the data module uses it too."""
        with arguments_of(self):
            return load_tokenizer(self.student_spec, "student")

    def configure_model(self) -> None:
        """Load student and teacher. The Trainer calls it once device and strategy are set up."""
        if not hasattr(self, "student"):
            with arguments_of(self):
                self._load_models()

    def _load_models(self) -> None:
        device_type, precision = device_and_precision(self)
        avoid_cudnn_attention(device_type)
        keep_freed_memory(device_type)
        trained = self.student_spec.lora is None
        self.student_spec = resolve_dtype(self.student_spec, "student", device_type, trained)
        self.student, frozen = load_models(
            self.student_spec, self.frozen_configs, self.tokenizer, device_type, sharding_of(self), self.padding_free
        )
        self.teacher, self.reference = frozen.get("teacher"), frozen.get("reference")
        if self.student.cuda_graphs:
            with self.trainer.precision_plugin.val_step_context() if self._trainer else nullcontext():
                check_fixed_passes(self.student, "student", self.student.model.device)
        warn_of_emulation(self.student, "student", device_type, precision)
        self.stop_ids = stop_token_ids(self.tokenizer, self.student.model.generation_config)
        teacher = self.local_teacher
        self.decoders = {"student": Decoder(self.student, self.stop_ids, teacher, self._on_decoding_step)}
        if teacher is not None:
            self.decoders["teacher"] = Decoder(teacher, self.stop_ids, on_step=self._on_decoding_step)
        self.generators: dict[str, Generator] = {name: self._generator(own) for name, own in self.decoders.items()}
        self._text = self._evaluator(self.objectives, "objectives")
        self._corpus = self._evaluator(self.corpus_objectives, "corpus_objectives")
        self.token_metrics = TokenMetrics(
            dict(self.objectives.items()),
            self.student,
            self.teacher,
            self.head_chunk_rows,
            compares(self.teacher_config),
            self.reference,
        )

    def _generator(self, decoder: Decoder) -> Generator:
        """The generator that is configured for the model of the project's own ``decoder``."""
        if self.generator is None:
            return decoder
        return self.generator.generator(decoder.model, self.stop_ids, self._on_decoding_step)

    @property
    def all_objectives(self) -> dict[str, Objective]:
        """The objectives on the source's sequences and those on the corpus, by name."""
        return {**dict(self.objectives.items()), **dict(self.corpus_objectives.items())}

    def _evaluator(self, objectives: Mapping[str, Objective], key: str) -> ObjectiveEvaluator:
        return ObjectiveEvaluator(objectives, self.student, self.teacher, key, self.head_chunk_rows, self.reference)

    def setup(self, stage: str) -> None:
        """Reject unsupported Trainer options and data settings, before any weights load."""
        with arguments_of(self):
            validation.check_strategy(self.trainer)
            device_type, _ = device_and_precision(self)
            check_graphs(self.model_specs, device_type, sharded=sharding_of(self) is not None)
            if self.targets is not None:
                self.targets.check(self.tokenizer)
            if stage == "fit":
                validation.check_fit(self)
            if self.generator is not None:
                self.generator.check(self.student_spec, self.teacher_spec, sharded=sharding_of(self) is not None)
            validation.check_lengths(self, stage)
            validation.check_tokens(self)
            validation.check_references(self, stage)
        if stage == "fit":
            # Only now: with manual optimisation from the start, Lightning would reject trainer.gradient_clip_val.
            self.automatic_optimization = False
            if hasattr(data := self.trainer.datamodule, "training_prompts"):  # type: ignore[attr-defined]
                data.training_prompts = self.source.reads_prompts

    def configure_optimizers(self) -> Any:
        """The optimiser and, if configured, a learning-rate scheduler over the optimiser steps of the whole run."""
        steps = partial(scheduled_steps, self)
        with arguments_of(self):
            return configure_optimizer(
                self.optimizer_factory,
                self.lr_scheduler_factory,
                self.parameters(),
                steps,
                scales_gradients=self.trainer.precision == "16-mixed",
            )

    @property
    def trained_steps(self) -> int:
        """Optimiser steps of the student: those of this run, or of the loaded checkpoint in validate, test and predict."""
        return self.global_step or self._loaded_steps

    def total_steps(self) -> int:
        """Optimiser steps of the whole run, over all of its batches."""
        batch_size = getattr(self.trainer.datamodule, "batch_size", 1)  # type: ignore[attr-defined]
        steps = batches_of_run(self.trainer) * self.source.steps_per_batch(batch_size)
        return min(steps, self.trainer.max_steps) if self.trainer.max_steps > 0 else steps

    def on_fit_start(self) -> None:
        """Set the student to training mode: Hugging Face loads models in evaluation mode, without dropout and checkpointing."""
        self.student.train()
        if note := note_on_routers(self.student.config):
            rank_zero_info(note)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Do one optimiser step for each mini-batch that the source makes from ``batch``."""
        self.guard.ids = batch.ids
        with arguments_of(self):
            self._train_on(batch)

    def _train_on(self, batch: Batch) -> None:
        phase = phase_of(batch, self.source, self._rollout_context(), self.unfinished, self.device)
        self.unfinished = None
        corpus = split_corpus(batch.corpus, phase.steps) if self.corpus_objectives else repeat(None, phase.steps)
        plain_texts = islice(corpus, phase.done, None)
        for done, (text, plain_text) in enumerate(zip(phase.texts, plain_texts, strict=False), start=phase.done + 1):
            self._optimize(text if self.targets is None else self.targets.apply(text, self.tokenizer), plain_text)
            if self.global_step == self.trainer.max_steps:
                self.unfinished = UnfinishedPhase.of(phase, done, batches=self.trainer.fit_loop.total_batch_idx + 1)
                break

    def _rollout_context(self) -> RolloutContext:
        generators: Mapping[str, Generator] = self.decoders if self.source.mixes_teacher else self.generators
        return RolloutContext(
            student=self.student,
            teacher=self.teacher,
            generators=generators,
            step=self.global_step,
            total_steps=self.total_steps,
            rank=self.data_ranks.rank,
            world_size=self.data_ranks.number,
            sum_over_ranks=self.sum_over_ranks,
            on_rollouts=partial(self.hooks.call, self, "on_rollouts"),
            needs=frozenset().union(*(objective.needs for objective in self.objectives.values())),
            entropies=any(getattr(callback, "reads_entropies", False) for callback in self.trainer.callbacks),  # type: ignore[attr-defined]
            reference=self.reference,
            response_texts=self.response_texts,
            stop_ids=self.stop_ids,
        )

    def _on_decoding_step(self, step: int, steps: int, rows: int) -> None:
        if self.decoding_progress is not None:
            self.decoding_progress(step, steps, rows)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Raise the exception that a callback raised in the middle of the batch, if any."""
        self.hooks.raise_postponed()

    def _optimize(self, text: Sequences | Pairs, corpus: Sequences | None) -> None:
        # Objectives with weight 0 are not computed.
        weights = {name: objective.weight for name, objective in self.all_objectives.items() if objective.weight}
        streams = [(self._text, text)] if corpus is None else [(self._text, text), (self._corpus, corpus)]
        needed = [(evaluator, texts) for evaluator, texts in streams if weights.keys() & evaluator.objectives.keys()]
        parts = [(evaluator, part) for evaluator, texts in needed for part in self.micro_batches(texts)]
        for evaluator, part in parts:
            evaluator.prefetch(part, weights)
        counts = global_counts(parts, weights, self.sum_over_ranks)
        # If a count is 0, the sum is 0 too and the factor only has to be finite. Times ranks: gradients are averaged over ranks.
        ranks = self.data_ranks.number
        factors = {name: weights[name] * ranks / counts[name].clamp(min=1).float() for name in counts}
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        terms: dict[str, LossTerm] = {}
        for i, (evaluator, part) in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else without_gradient_sync(self):
                loss, here = evaluator(part, {name: factors[name] for name in evaluator.objectives if name in factors})
                self.manual_backward(loss)
            terms |= {name: add_terms(terms[name], term) if name in terms else term for name, term in here.items()}
        self.guard.mask(self.parameters(), self.global_step + 1)
        if self.trainer.gradient_clip_val:
            self.clip_gradients(
                optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm or "norm"
            )
        optimizer.step()
        for teacher in self.frozen_configs.values():
            teacher.after_step(self.student, self.global_step)
        self._log_step(terms, counts, weights)
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def micro_batches(self, text: Sequences | Pairs) -> list[Any]:
        """Parts of at most `micro_batch_size` texts, equally many on all ranks: a rank with fewer gets texts without targets."""
        size = self.micro_batch_size or len(text)
        parts: list[Any] = [text.slice(start, start + size) for start in range(0, len(text), size)]
        return parts + [text.slice(0, 1).without_targets()] * (max_over_ranks(self, len(parts)) - len(parts))

    @property
    def data_ranks(self) -> DataRanks:
        """The share of every batch that this rank has."""
        return data_ranks(self.trainer)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks that have different items; every rank gets the result."""
        summed: Tensor = self.trainer.strategy.reduce(values, group=self.data_ranks.group, reduce_op="sum")
        return summed

    def over_ranks(self, metric: MetricType) -> MetricType:
        """Let a torchmetrics metric reduce over the same ranks as `sum_over_ranks`, and move it to this rank's device."""
        metric.process_group = self.data_ranks.group
        return metric.to(self.device)

    def _log_step(
        self, terms: Mapping[str, LossTerm], counts: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> None:
        means = term_means(terms, counts, self.sum_over_ranks)
        metrics = {f"train/{name}": mean for name, mean in means.items()}
        metrics["train/loss"] = torch.stack([weights[name] * means[name] for name in terms if name in weights]).sum()
        self.log("loss", metrics["train/loss"], prog_bar=True, logger=False)
        optimizer: Any = self.optimizers()
        metrics |= {f"train/{name}": rate for name, rate in learning_rate(optimizer).items()}
        metrics |= {f"rollout/{name}": torch.tensor(value) for name, value in self.source.metrics().items()}
        metrics |= self.guard.metrics()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = self.global_step == 1 or self.global_step % (every or CHECK_EVERY) == 0
        if due:
            absent = [f"train/{name}" for name in terms if "/" in name and bool(means[name].isnan())]
            metrics = {name: value for name, value in metrics.items() if name not in absent}
            self.guard.check(self.trainer, metrics["train/loss"])
            self._warn_of_nothing(counts)
        self.log_step_metrics(metrics, write=due and every > 0)
        self.hooks.call_after_step(self, {**means, "loss": metrics["train/loss"]})

    def _warn_of_nothing(self, counts: Mapping[str, Tensor]) -> None:
        """Say once which objectives have counted no item of a step, and so have taught nothing there."""
        for name in counts.keys() - self._empty:
            if not counts[name]:
                self._empty.add(name)
                key = "objectives" if name in self.objectives else "corpus_objectives"
                rank_zero_warn(
                    f"model.{key}.{name}: it counted no item in step {self.global_step}, so it taught nothing there. If that is "
                    "not meant, look at what it leaves out."
                )

    def log_step_metrics(self, metrics: Mapping[str, Tensor], write: bool = True) -> None:
        """Log training metrics for callbacks and, if ``write``, to the loggers at this optimiser step; equal on all ranks.

        One batch may have many optimiser steps; Lightning's own `log` would keep the values of the last one only.
        """
        self.log_dict(dict(metrics), logger=False)
        if write:
            values = {name: float(value) for name, value in metrics.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)

    def record(self, metrics: Mapping[str, Tensor], write: bool = True) -> None:
        """Deprecated name of `log_step_metrics`."""
        warnings.warn("DistillationModule.record is now log_step_metrics.", FutureWarning, stacklevel=2)
        self.log_step_metrics(metrics, write)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Update the token-level metrics of the student on held-out responses."""
        if batch.sequences is None:
            return
        self.token_metrics.update(self.micro_batches(batch.sequences))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all ranks under ``val/``. During `fit` the source may react to them."""
        metrics = self._log_held_out("val")
        fitting = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fitting and validation_was_due(self.trainer):
            self.source.observe_validation(metrics)

    def on_test_epoch_end(self) -> None:
        """Log the metrics over all ranks under ``test/``."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> dict[str, Tensor]:
        if metrics := self.token_metrics.metrics():
            validation.check_finite(metrics["perplexity"], f"{stage}/perplexity", self.global_step)
            self.log_metrics_at_step({f"{stage}/{name}": value for name, value in metrics.items()})
        return metrics

    def on_validation_epoch_start(self) -> None:
        """Reset the token-level metrics."""
        self.over_ranks(self.token_metrics.means).reset()

    on_test_epoch_start = on_validation_epoch_start

    def log_metrics_at_step(self, metrics: Mapping[str, Tensor]) -> None:
        """Log metrics that are equal on all ranks with the optimiser step as x-axis; Lightning's own step differs."""
        self.log_dict({**metrics, "step": float(self.trained_steps)})

    def log_figures(self, metrics: Mapping[str, Tensor]) -> None:
        """Deprecated name of `log_metrics_at_step`."""
        warnings.warn("DistillationModule.log_figures is now log_metrics_at_step.", FutureWarning, stacklevel=2)
        self.log_metrics_at_step(metrics)

    def generate(
        self, prompts: Prompts, ids: tuple[str, ...], sampling: SamplingParams, seed: int = 0, model: str = "student"
    ) -> Responses:
        """Generate with student or teacher; each response depends on ``seed`` and the id of its item alone."""
        if model not in self.generators:
            raise self._cannot_generate(model)
        return self.generators[model].generate(prompts, ids, sampling, seed)

    def _cannot_generate(self, model: str) -> ArgumentError:
        return ArgumentError(
            self, f"prediction.model: the run has no {model} that can generate. Set model.teacher.path."
        )

    def response_texts(self, responses: Responses) -> list[str]:
        """The responses as strings, without special tokens."""
        rows = [ids[mask].tolist() for ids, mask in zip(responses.ids.cpu(), responses.mask.cpu(), strict=True)]
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per item, except those that an earlier run has written; see `prediction_records`."""
        assert batch.prompts is not None
        self._check_predicted(batch)
        if not max_over_ranks(self, not self.predicted.keys() >= set(batch.ids)):
            return []
        settings = self.prediction
        responses = self.generate(batch.prompts, batch.ids, settings, settings.seed, settings.model)
        texts = self.response_texts(responses)
        records = prediction_records(
            batch, responses, texts, self.stop_ids, settings, self.tokenizer, self.prediction_weights
        )
        return [record for record in records if record["id"] not in self.predicted]

    def _check_predicted(self, batch: Batch) -> None:
        """Refuse to go on with a file that has answers to other prompts."""
        prompts = zip(batch.ids, batch.prompt_texts, strict=True)
        changed = [item for item, prompt in prompts if self.predicted.get(item) not in (None, prompt)]
        if max_over_ranks(self, len(changed)):
            raise ArgumentError(
                self.prediction,
                f"path: {self.prediction.path} has answers to other prompts, such as of {', '.join(changed[:1]) or 'an item'}: "
                "the data or data.init_args.template have changed. Give another path, or remove the file.",
            )

    def on_predict_start(self) -> None:
        """Identify the weights that generate: those of the model, or of the checkpoint that replaces them."""
        name = self.prediction.model
        checkpoint = self.trainer.ckpt_path if name == "student" else None
        if name not in self.model_specs:
            raise self._cannot_generate(name)
        with arguments_of(self):
            self.prediction_weights = weights_digest(
                self.model_specs[name], name, Path(checkpoint) if checkpoint else None
            )

    def teardown(self, stage: str) -> None:
        """Close what the teacher holds open."""
        for teacher in self.frozen_configs.values():
            teacher.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the run, and what is needed to rebuild the student without the run's YAML."""
        self.guard.check(self.trainer)
        save_run(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the run. Parts that an old checkpoint lacks are skipped; the model must be the same."""
        load_run(self, checkpoint)
        self._loaded_steps = checkpoint["global_step"]
