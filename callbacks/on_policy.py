"""Samples several responses to each held-out prompt: how many are correct, and what the teacher predicts along them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_distill.callbacks.prompt_evaluator import PromptEvaluator, Stage, generate_for_prompts
from lit_distill.callbacks.runaway import RunawayDetector
from lit_distill.evaluation.checkers import Checker, ExactMatch, score_of
from lit_distill.evaluation.on_policy import OnPolicyTerms, pass_at_k
from lit_distill.evaluation.quality import TermMeanMetric
from lit_distill.generation import SamplingParams
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.teachers import Teacher, cached_parts
from lit_distill.types import ArgumentError, Batch, check_sizes, join_prompts

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Responses

TERMS = "on_policy"


class OnPolicyEvaluator(PromptEvaluator):
    """Samples responses of the student to held-out prompts, and logs how many are correct, and what the teacher thinks of them.

    Logged as ``val/…`` and ``test/…``. In percent, over the prompts with references: ``pass_at_<k>``, the chance that one of k
    responses is correct, and ``mean_at_<n>``, the mean score of the n that were sampled. Over all responses: ``sampled_length`` in
    tokens, and ``sampled_unfinished``, the share cut off at max_new_tokens. Over their tokens, if the teacher answers for all
    tokens of generated texts: ``top_k_overlap``, ``on_policy_reverse_kl``, ``on_policy_student_entropy`` and
    ``on_policy_teacher_entropy``; see `OnPolicyTerms`. `fit` warns once if the length, or once if the overlap, runs away.

    Args:
        max_prompts: about how many prompts of a split to use, spread over it; 0 switches it off, -1 takes all.
        every_n_validations: during `fit`, run at every n-th validation only; null runs at none.
        num_responses: n, responses to each prompt.
        k: the k of ``pass_at_<k>``; by default 1 and n.
        max_new_tokens: longest response.
        temperature: divides the logits.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this total probability.
        seed: seed of the sampling; together with an item's id it fixes the responses.
        checker: scores the responses; those with score 1 are correct. `ExactMatch` by default.
        overlap_top_k: number of most probable tokens of each model that ``top_k_overlap`` compares.
    """

    def __init__(
        self,
        max_prompts: int = 0,
        every_n_validations: int | None = 1,
        num_responses: int = 8,
        k: list[int] | None = None,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        checker: Checker | None = None,
        overlap_top_k: int = 16,
    ) -> None:
        super().__init__(max_prompts, every_n_validations)
        check_sizes(num_responses=num_responses, overlap_top_k=overlap_top_k)
        self.sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p)
        if num_responses > 1 and temperature == 0:
            raise ValueError(
                f"num_responses: {num_responses} with temperature 0, at which all responses to a prompt are the same. Give 1, or "
                "temperature: 1.0."
            )
        self.k = sorted({1, num_responses}) if k is None else k
        if not self.k or len(set(self.k)) < len(self.k) or not all(1 <= one <= num_responses for one in self.k):
            raise ValueError(f"k: expected different numbers from 1 to num_responses ({num_responses}), got {k}.")
        self.num_responses = num_responses
        self.seed = seed
        self.checker = ExactMatch() if checker is None else checker
        self.overlap_top_k = overlap_top_k
        self._per_prompt = [*(f"pass_at_{one}" for one in self.k), f"mean_at_{num_responses}"]
        self._responses = TermMeanMetric((*self._per_prompt, "sampled_length", "sampled_unfinished"))
        self._tokens = TermMeanMetric(OnPolicyTerms.metric_names)
        self._evaluator: ObjectiveEvaluator | None = None
        self._runaway = RunawayDetector()
        self._told = self._told_of_teacher = False

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a validation logs, if prompts have references; does not need the weights."""
        if not self.max_prompts or self.every_n_validations is None:
            return []
        tokens = self._tokens.names if _answers_student(pl_module.teacher_config) else ()
        return [f"val/{name}" for name in (*self._responses.names, *tokens)]

    def on_start(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Reset the results."""
        for metric in (self._responses, self._tokens):
            pl_module.over_ranks(metric).reset()
        self._evaluator = None
        if _answers_student(pl_module.teacher_config):
            terms = {TERMS: OnPolicyTerms(self.overlap_top_k)}
            models = pl_module.student, pl_module.teacher
            self._evaluator = ObjectiveEvaluator(terms, *models, "on_policy", pl_module.head_chunk_rows)
        elif pl_module.teacher_config is not None and not self._told_of_teacher:
            self._told_of_teacher = True
            rank_zero_info(
                f"on_policy: {', '.join(self._tokens.names)} are left out, since the teacher does not answer for all tokens of "
                "generated texts."
            )

    def on_batch(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Sample responses to every prompt, score them, and evaluate both models on them."""
        scores, lengths, finished = [], [], []
        for sample in range(self.num_responses):
            with trainer.precision_plugin.val_step_context():
                responses = generate_for_prompts(pl_module, batch, self.sampling, self.seed, "student", sample)
                self._compare(pl_module, batch, responses)
            texts = pl_module.response_texts(responses)
            known = zip(batch.ids, texts, batch.accepted, strict=False)  # a rank without items has one dummy response
            scores.append([score_of(self.checker, text, accepted, item) for item, text, accepted in known if accepted])
            lengths.append(responses.mask.sum())
            finished.append(responses.finished(pl_module.stop_ids).sum())
        self._add(torch.tensor(scores, dtype=torch.float64), torch.stack(lengths), torch.stack(finished), len(batch))

    def _add(self, scores: Tensor, lengths: Tensor, finished: Tensor, num_prompts: int) -> None:
        """Add scores ``[n, prompts with references]``, and the sums of lengths and of finished responses, ``[n]`` each."""
        correct = (scores >= 1).sum(dim=0)
        totals = {f"pass_at_{k}": 100 * pass_at_k(self.num_responses, correct, k).sum() for k in self.k}
        totals[f"mean_at_{self.num_responses}"] = 100 * scores.sum() / self.num_responses
        counts: dict[str, Tensor | int] = dict.fromkeys(totals, scores.shape[1])
        num_responses = self.num_responses * num_prompts
        totals |= {"sampled_length": lengths.sum(), "sampled_unfinished": num_responses - finished.sum()}
        self._responses.update(totals, {**dict.fromkeys(self._responses.names, num_responses), **counts})

    def _compare(self, pl_module: DistillationModule, batch: Batch, responses: Responses) -> None:
        if self._evaluator is None:
            return
        assert batch.prompts is not None
        text = join_prompts(batch.prompts, responses, {}, batch.items)
        for part in pl_module.micro_batches(text):
            _, terms = self._evaluator(part, {TERMS: 1.0})
            term = terms[TERMS]
            self._tokens.update(dict(term.metrics), dict.fromkeys(self._tokens.names, term.count))

    def on_end(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Log the metrics over all ranks, and warn of a student that runs away."""
        if not self._responses.update_called:
            return  # the split has no prompts
        metrics = {name: mean for name, mean in self._responses.compute().items() if name != "count"}
        if metrics[self._per_prompt[0]].isnan():
            self._without_references(trainer, stage)
            metrics = {name: mean for name, mean in metrics.items() if name not in self._per_prompt}
        if self._tokens.update_called:
            tokens = self._tokens.compute()
            metrics |= {name: tokens[name] for name in self._tokens.names if tokens["count"]}
        pl_module.log_metrics_at_step({f"{stage}/{name}": mean for name, mean in metrics.items()})
        if stage == "val" and trainer.state.fn == "fit":
            overlap = metrics.get("top_k_overlap")
            shape = float(metrics["sampled_length"]), float(metrics["sampled_unfinished"])
            for warning in self._runaway.check(
                pl_module.trained_steps, *shape, None if overlap is None else float(overlap)
            ):
                rank_zero_warn(warning)

    def _without_references(self, trainer: Trainer, stage: Stage) -> None:
        """Say that no response was checked; end the run if its checkpoints wait for that."""
        missing = (
            f"no prompt of the {stage} data has references, so {', '.join(self._per_prompt)} are not known. Map a column, such as "
            "data.init_args.fields: {references: answer}"
        )
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "monitor", None) in {f"{stage}/{name}" for name in self._per_prompt}:
                raise ArgumentError(callback, f"monitor: {missing}, or choose another monitor.")
        if not self._told:
            self._told = True
            rank_zero_warn(f"on_policy: {missing}.")

    def state_dict(self) -> dict[str, Any]:
        """The number of validations, and what the next ones are compared with, which depends on some settings."""
        return {**super().state_dict(), "runaway": self._runaway.state_dict(), "settings": self._settings()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; with other settings, the comparison starts anew."""
        super().load_state_dict(state_dict)
        if state_dict["settings"] == self._settings():
            self._runaway.load_state_dict(state_dict["runaway"])

    def _settings(self) -> list[float]:
        sampling = self.sampling
        sampled = [sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p]
        return [*sampled, self.max_prompts, self.overlap_top_k]


def _answers_student(teacher: Teacher | None) -> bool:
    """Whether the teacher's probabilities of all tokens of the student's own texts are known."""
    return teacher is not None and not cached_parts(teacher) and teacher.knows_all_probabilities
