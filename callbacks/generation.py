"""Generates responses to held-out prompts and compares them with the references."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lit_distill.callbacks.prompt_evaluator import PromptEvaluator, Stage, generate_and_score
from lit_distill.callbacks.samples import show_samples
from lit_distill.evaluation.checkers import Checker
from lit_distill.evaluation.text_metrics import CHECKED, MEANS, NGRAM_SIZES, GenerationMetrics
from lit_distill.generation import SamplingParams
from lit_distill.types import Batch

BY_LENGTH = ("rouge_l/", "exact_match/", f"{CHECKED}/")
"""Beginnings of the metrics by reference length that `test` logs; the report has all of them."""

if TYPE_CHECKING:
    import torch

    from lit_distill.module import DistillationModule


class GenerationEvaluator(PromptEvaluator):
    """Generates responses to the prompts of the validation and test data and logs ``val/rouge_l``, ``val/exact_match`` and more.

    Also logged are ``response_length``, ``unfinished``, ``distinct_1`` to ``distinct_4`` and ``repetition_4``, as in
    `GenerationMetrics`, and ``answer_accuracy`` with a checker. `test` adds metrics by reference length
    (``test/rouge_l/under_30_words``), the standard deviation over seeds (``test/rouge_l_std``) and the teacher's
    (``test/teacher_rouge_l``).

    Args:
        max_prompts: about how many prompts of a split to use, spread over it; 0 switches it off, -1 takes all.
        every_n_validations: during `fit`, run at every n-th validation only.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this total probability.
        seed: seed of the sampling; together with an item's id it fixes the response.
        seeds: instead of ``seed``: `test` generates once with each seed and logs the mean; a validation uses the first.
        reference_lengths: numbers of words at which a bucket of reference lengths begins; the default has MiniLLM's three.
        teacher: generate with the teacher too, at `test`, if there is one.
        num_samples: how many responses to show as text in TensorBoard.
        checker: decides which responses are correct, such as `NumberMatch` or `ChoiceMatch`; none by default.
    """

    needs_references = True

    def __init__(
        self,
        max_prompts: int = 256,
        every_n_validations: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        seeds: list[int] | None = None,
        reference_lengths: list[int] = [30, 71],  # noqa: B006 - the YAML's default, never changed
        teacher: bool = True,
        num_samples: int = 8,
        checker: Checker | None = None,
    ) -> None:
        super().__init__(max_prompts, every_n_validations)
        self.sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p)
        self.seeds = _checked_seeds([seed] if seeds is None else seeds, temperature)
        if reference_lengths != sorted(set(reference_lengths)) or min(reference_lengths, default=1) < 1:
            raise ValueError(
                f"reference_lengths: expected ascending numbers of words, at least 1, got {reference_lengths}."
            )
        self.reference_lengths = reference_lengths
        self.teacher = teacher
        self.num_samples = num_samples
        self.checker = checker
        self._scores: dict[str, list[GenerationMetrics]] = {}
        self._samples: list[dict[str, Any]] = []
        self._report: dict[str, Any] = {}

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a validation logs; does not need the weights."""
        checked = [] if self.checker is None else [CHECKED]
        names = [*MEANS, *checked, *(f"distinct_{n}" for n in NGRAM_SIZES), f"repetition_{NGRAM_SIZES[-1]}"]
        known = getattr(trainer.datamodule, "validates_references", True)  # type: ignore[attr-defined]
        return [f"val/{name}" for name in names] if self.max_prompts and known else []

    def on_start(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Reset the results."""
        testing = stage == "test"
        models = ["student", "teacher"] if testing and self.teacher and pl_module.teacher_spec else ["student"]
        seeds, starts = (self.seeds, self.reference_lengths) if testing else (self.seeds[:1], [])
        self._scores = {
            role: [pl_module.over_ranks(GenerationMetrics(starts, self.checker)) for _ in seeds] for role in models
        }
        self._samples = []
        self._report = {}

    def on_batch(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Generate with each model, once with each seed."""
        texts_of: dict[str, list[str]] = {}
        for role, per_seed in self._scores.items():
            texts = [
                generate_and_score(pl_module, batch, self.sampling, seed, role, scores)
                for seed, scores in zip(self.seeds, per_seed, strict=False)
            ]
            texts_of[role] = texts[0]
        for row in range(min(len(batch), self.num_samples - len(self._samples))):
            reference = next(iter(batch.accepted[row]), "")
            known = {"id": batch.ids[row], "prompt": batch.prompt_texts[row], "reference": reference}
            self._samples.append(known | {role: texts[row] for role, texts in texts_of.items()})

    def on_end(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Log the metrics over all ranks."""
        if not all(scores.update_called for per_seed in self._scores.values() for scores in per_seed):
            return  # the split has no prompts with references
        summaries = {
            role: summarize_seeds([scores.compute() for scores in per_seed]) for role, per_seed in self._scores.items()
        }
        metrics = {}
        for role, summary in summaries.items():
            prefix = "" if role == "student" else f"{role}_"
            for name, score in summary.items():
                whole = "/" not in name
                if whole or name.startswith(BY_LENGTH):
                    metrics[f"{stage}/{prefix}{name}"] = score["mean"]
                if whole and score["n"] > 1:
                    metrics[f"{stage}/{prefix}{name}_std"] = score["std"]
        pl_module.log_metrics_at_step(metrics)
        models = list(summaries)
        heads = ["prompt", "response", *models[1:], "reference"]
        rows = [[sample[key] for key in ("prompt", *models, "reference")] for sample in self._samples]
        show_samples(trainer, f"{stage}/samples", heads, rows, pl_module.trained_steps)
        if stage == "test":
            self._report = {"generation": [self._section(role, summary) for role, summary in summaries.items()]}

    def _section(self, role: str, summary: dict[str, dict[str, Any]]) -> dict[str, Any]:
        buckets = []
        for bucket in self._scores[role][0].buckets:
            scores = {
                name.split("/")[0]: score["mean"] for name, score in summary.items() if name.endswith("/" + bucket.tag)
            }
            if scores:
                edges = {"label": bucket.label, "low": bucket.low, "high": bucket.high}
                buckets.append(edges | {"count": int(scores.pop("count")), "scores": scores})
        samples = [
            {"id": s["id"], "prompt": s["prompt"], "response": s[role], "reference": s["reference"]}
            for s in self._samples
        ]
        scores = {name: score for name, score in summary.items() if "/" not in name}
        return {"role": role, "scores": scores, "buckets": buckets, "samples": samples}

    def report(self) -> dict[str, Any]:
        """Results of the last test: scores of each model, in total and by bucket, and samples; empty without a test."""
        return self._report


def summarize_seeds(metrics: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (None for one seed) and number of seeds of each metric, by name."""
    summary = {}
    for name in dict.fromkeys(name for seed in metrics for name in seed):
        values = [float(seed[name]) for seed in metrics if name in seed]
        std = stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": fmean(values), "std": std, "n": len(values)}
    return summary


def _checked_seeds(seeds: list[int], temperature: float) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected one or more different numbers, got {seeds}.")
    if len(seeds) > 1 and temperature == 0:
        raise ValueError(
            f"seeds: {seeds} with temperature 0, at which every seed gives the same response. "
            "Give one seed, or temperature: 1.0."
        )
    return seeds
