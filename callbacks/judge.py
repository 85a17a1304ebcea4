"""Scores the student's responses and the references with a strong language model."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_distill.callbacks.prompt_evaluator import PromptEvaluator, Stage, generate_for_prompts
from lit_distill.distributed import data_ranks
from lit_distill.evaluation.budget import Budget, CostTracker
from lit_distill.evaluation.chat import ChatClient, ChatEndpoint, EndpointError
from lit_distill.evaluation.judge import AnswerCache, JudgeResult, JudgeRun, Question
from lit_distill.generation import SamplingParams
from lit_distill.types import ArgumentError

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch

HEARTBEAT = 20.0
"""Seconds between messages to the ranks that wait for the judge, since collectives time out."""


class Judge(PromptEvaluator):
    """Asks an OpenAI-compatible endpoint to score responses and references and logs ``test/judge_ratio`` in percent.

    The ratio is the sum of the student's scores over the sum of the references', as in MiniLLM; ``judge_student``,
    ``judge_reference`` and ``judge_count`` are logged too. Rank 0 sends the requests of all ranks. If the judge does not
    answer, `fit` logs a warning instead of these metrics; `test` and `validate` end with an error after everything else is
    written. Answers are kept in the cache in both cases.

    It needs openai: ``pip install 'lit-distill[judge]'``.

    Args:
        endpoint: server and model of the judge. Its API key is read from the environment.
        budget: limits on the requests and the cost of a run; no limits by default.
        every_n_validations: also judge at `validate` and every n-th validation of `fit`; by default only at `test`.
        max_prompts: about how many prompts of a split to judge, spread over it; 0 switches it off, -1 takes all.
        max_new_tokens: longest response.
        temperature: sampling temperature of the responses; 0 is greedy.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this total probability.
        seeds: sampling seeds; each prompt gets one response per seed, and the ratio is the mean over seeds.
        swap: request scores with the two responses in both orders and take the mean, against the judge's position bias.
        num_workers: number of parallel requests.
        cache: JSONL file of the judge's answers; ``judge.jsonl`` in ``trainer.default_root_dir`` by default.
        num_samples: how many judged responses the report shows.

    Source: MiniLLM, https://arxiv.org/abs/2306.08543, section 3.
    """

    needs_references = True

    def __init__(
        self,
        endpoint: ChatEndpoint,
        budget: Budget | None = None,
        every_n_validations: int | None = None,
        max_prompts: int = 256,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] = (0,),
        swap: bool = False,
        num_workers: int = 4,
        cache: str | None = None,
        num_samples: int = 8,
    ) -> None:
        super().__init__(max_prompts, every_n_validations)
        for name, value, least in (("num_workers", num_workers, 1), ("num_samples", num_samples, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}.")
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds: expected one or more different numbers, got {list(seeds)}.")
        if temperature == 0 and len(seeds) > 1:
            raise ValueError(
                f"seeds: {list(seeds)} with temperature 0, where all responses are the same. Give one seed."
            )
        self.endpoint = endpoint
        self.budget = budget or Budget()
        if self.budget.max_cost is not None and endpoint.answer_tokens() is None:
            raise ValueError(
                "budget.max_cost: needs a limit on the length of an answer. Set endpoint.parameters.max_tokens."
            )
        self.sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p)
        self.seeds = tuple(seeds)
        self.swap = swap
        self.num_workers = num_workers
        self.cache = cache
        self.num_samples = num_samples
        self._questions: list[Question] = []
        self._account: CostTracker | None = None  # on rank 0 only
        self._warned_about_budget = False
        self._error: ValueError | None = None
        self._report: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Check that openai is installed and the API key is set, before any work is done.

        Raises:
            ArgumentError: of the endpoint, on all ranks.
        """
        self._error, self._report = None, {}
        judging = stage == "test" or (stage in ("fit", "validate") and self.every_n_validations)
        if judging and self.max_prompts:
            message = None
            if trainer.is_global_zero:
                try:
                    ChatClient(self.endpoint, CostTracker(self.budget)).close()
                except EndpointError as error:
                    message = str(error)
            if message := trainer.strategy.broadcast(message):
                raise ArgumentError(self.endpoint, message)

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a validation logs if the judge answers; does not need the weights."""
        names = ("judge_ratio", "judge_student", "judge_reference", "judge_count")
        return [f"val/{name}" for name in names] if self.max_prompts and self.every_n_validations else []

    def report(self) -> dict[str, Any]:
        """The metrics of the last test under ``judge``; empty without a test."""
        return {"judge": self._report} if self._report else {}

    def on_start(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Remove the questions of the last evaluation."""
        self._questions = []

    def on_batch(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Generate responses to the chosen prompts, once with each seed."""
        for seed in self.seeds:
            texts = pl_module.response_texts(generate_for_prompts(pl_module, batch, self.sampling, seed, "student"))
            rows = zip(batch.ids, batch.prompt_texts, texts, batch.accepted, strict=False)
            self._questions += [
                Question(item, seed, prompt, text, accepted[0]) for item, prompt, text, accepted in rows if accepted
            ]

    def on_end(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Send the responses of all ranks to the judge and log the metrics."""
        questions = self._gathered(trainer)
        result = self._run_judge(trainer, questions)
        if isinstance(result, JudgeResult) and result.scores:
            device = pl_module.device
            metrics = {f"{stage}/{name}": torch.tensor(v, device=device) for name, v in result.metrics().items()}
            pl_module.log_metrics_at_step(metrics)
            self._warn_if_incomplete(result, len(questions))
            if stage == "test":
                self._report = self._reported(trainer, result)
            return
        if isinstance(result, JudgeResult):
            if result.not_asked == len(questions):  # no questions, or no budget at all
                self._warn_if_incomplete(result, len(questions))
                return
            result = EndpointError(f"model: no usable answer from {self.endpoint.model}. {result.reason}")
        if trainer.state.fn == "fit":
            rank_zero_warn(f"Judge: this validation has no judge metrics. {result}")
        else:
            self._error = result

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Raise the error of the judge, after all other metrics are written.

        Raises:
            ArgumentError: if the judge failed in `test` or `validate`.
        """
        error, self._error = self._error, None
        if error is not None:
            raise ArgumentError(self.endpoint if isinstance(error, EndpointError) else self, str(error))

    def _gathered(self, trainer: Trainer) -> list[Question]:
        """The questions of all ranks, on all ranks, sorted by seed and then by a hash of the item's id."""
        shares: list[Any] = [self._questions]
        if trainer.world_size > 1:
            ranks = data_ranks(trainer)
            shares = [None] * ranks.number
            dist.all_gather_object(shares, self._questions, ranks.group)

        def order(question: Question) -> tuple[int, bytes]:
            digest = hashlib.blake2b(question.id.encode(), digest_size=8).digest()
            return self.seeds.index(question.seed), digest

        return sorted((question for share in shares for question in share), key=order)

    def _run_judge(self, trainer: Trainer, questions: Sequence[Question]) -> JudgeResult | ValueError:
        """The result or an error, equal on all ranks; rank 0 sends the requests and regularly broadcasts its status."""
        session: JudgeRun | None = None
        outcome: JudgeResult | ValueError | None = None
        with ExitStack() as opened:
            while outcome is None:
                if trainer.is_global_zero:
                    try:
                        session = session or self._start(trainer, questions, opened)
                        outcome = session.result() if session.wait(HEARTBEAT) else None
                    except ValueError as error:
                        outcome = error
                outcome = trainer.strategy.broadcast(outcome)
        return outcome

    def _start(self, trainer: Trainer, questions: Sequence[Question], opened: ExitStack) -> JudgeRun:
        """Send the questions; the connections and the cache are closed with ``opened``."""
        cache = opened.enter_context(closing(self._open_cache(trainer)))
        self._account = self._account or CostTracker(self.budget)
        client = ChatClient(self.endpoint, self._account)
        return opened.enter_context(
            closing(JudgeRun(questions, client, cache, swap=self.swap, num_workers=self.num_workers))
        )

    def _open_cache(self, trainer: Trainer) -> AnswerCache:
        path = Path(self.cache) if self.cache else Path(trainer.default_root_dir) / "judge.jsonl"
        cache = AnswerCache(path)
        if cache.unreadable_lines:
            rank_zero_info(
                f"{path}: {cache.unreadable_lines} lines cannot be read; their questions are asked again if needed."
            )
        return cache

    def _warn_if_incomplete(self, result: JudgeResult, num_questions: int) -> None:
        if result.not_asked and not self._warned_about_budget:
            self._warned_about_budget = True
            rank_zero_warn(
                f"Judge: the budget is reached; {result.not_asked} of {num_questions} responses were not judged, and the metrics "
                f"use {len(result.scores)}. Answers are cached: with a larger budget, only the remaining requests are sent."
            )
        if left := result.unparsable + result.refused:
            rank_zero_warn(
                f"Judge: {result.unparsable} answers have no scores and {result.refused} requests were refused; the metrics "
                f"use {len(result.scores)} of {num_questions} responses, without these {left}. {result.reason}"
            )

    def _reported(self, trainer: Trainer, result: JudgeResult) -> dict[str, Any]:
        spent = {} if self._account is None else self._account.spent()
        ratios = result.ratios()
        return {
            "model": self.endpoint.model,
            "swap": self.swap,
            **{name.removeprefix("judge_"): value for name, value in result.metrics().items()},
            "count": len(result.scores),
            "ratios": ratios,
            "ratio_std": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
            "unparsable": result.unparsable,
            "refused": result.refused,
            "not_asked": result.not_asked,
            "cached": result.cached,
            **trainer.strategy.broadcast(spent),
            "samples": [
                {
                    "id": question.id,
                    "prompt": question.prompt,
                    "response": question.response,
                    "reference": question.reference,
                    "student_score": student,
                    "reference_score": reference,
                }
                for question, student, reference in result.scores[: self.num_samples]
            ],
        }
