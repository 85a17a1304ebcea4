"""A strong model compares the student's responses with the references."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lit_distill.callbacks.answers import PromptEvaluator, Stage, answer

from lit_distill.evaluation.budget import Account, Budget
from lit_distill.evaluation.chat import ChatEndpoint
from lit_distill.evaluation.judge import AnswerCache, Question, Session, Verdict
from lit_distill.parallel import data_ranks
from lit_distill.rollouts import Decoding

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Batch

HEARTBEAT = 20.0
"""Seconds after which the ranks that wait for the judge hear that it is still at work; collectives have time limits."""


class Judge(PromptEvaluator):
    """Asks an OpenAI-compatible endpoint to score responses and references and logs ``test/judge_ratio`` in percent.

    The ratio is the sum of the student's scores over the sum of the references', as in MiniLLM; ``judge_student``,
    ``judge_reference`` and ``judge_count`` stand beside it. Rank 0 asks for all. A judge that is down costs `fit` a warning and
    these figures; `test` and `validate` end with an error after everything else is written. What was answered is kept in the
    cache either way.

    Args:
        endpoint: who judges. Its key is read from the environment.
        budget: what a run may spend; nothing is set by default.
        every_n_validations: also judge at `validate` and every n-th validation of `fit`; by default only at `test`.
        max_prompts: about how many prompts of a split to judge, spread over it; 0 switches it off, -1 takes all.
        max_new_tokens: longest response.
        temperature: of the responses; 0 is greedy.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        seeds: of the responses, one response to each prompt for each; the ratio is the mean over them.
        swap: ask with the two answers in both orders and take the mean, against the judge's preference for a place.
        num_workers: requests under way at a time.
        cache: JSONL file of the answers; ``judge.jsonl`` in ``trainer.default_root_dir`` by default.
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
        super().__init__("Judge", max_prompts, every_n_validations)
        for name, value, least in (("num_workers", num_workers, 1), ("num_samples", num_samples, 0)):
            if value < least:
                raise ValueError(f"Judge.{name}: expected at least {least}, got {value}.")
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"Judge.seeds: expected at least one, and each once, got {list(seeds)}.")
        if temperature == 0 and len(seeds) > 1:
            raise ValueError(
                f"Judge.seeds: {list(seeds)} at temperature 0, where all draws are the same. Give one seed."
            )
        self.endpoint = endpoint
        self.budget = budget or Budget()
        if self.budget.max_cost is not None and endpoint.answer_tokens() is None:
            raise ValueError(
                "Judge.budget.max_cost: needs a limit on an answer. Set Judge.endpoint.parameters.max_tokens."
            )
        self.decoding = Decoding(max_new_tokens, temperature, top_k, top_p)
        self.seeds = tuple(seeds)
        self.swap = swap
        self.num_workers = num_workers
        self.cache = cache
        self.num_samples = num_samples
        self._questions: list[Question] = []
        self._account: Account | None = None  # of the rank that asks
        self._told = False  # that the budget is spent
        self._error: str | None = None
        self._report: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Look for the key before any work is done.

        Raises:
            ValueError: naming the environment variable, on all ranks.
        """
        self._error, self._report = None, {}
        judging = stage == "test" or (stage in ("fit", "validate") and self.every_n_validations)
        if judging and self.max_prompts:
            missing = None
            if trainer.is_global_zero:
                try:
                    self.endpoint.key()
                except ValueError as error:
                    missing = str(error)
            if missing := trainer.strategy.broadcast(missing):
                raise ValueError(missing)

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """What a validation logs, where the judge answers; known before any weights load."""
        names = ("judge_ratio", "judge_student", "judge_reference", "judge_count")
        return [f"val/{name}" for name in names] if self.max_prompts and self.every_n_validations else []

    def report(self) -> dict[str, Any]:
        """The last test's figures under ``judge``; empty if there was none."""
        return {"judge": self._report} if self._report else {}

    def begin(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Forget the last time."""
        self._questions = []

    def measure(self, trainer: Trainer, pl_module: DistillationModule, batch: Batch) -> None:
        """Answer the chosen prompts, once with each seed."""
        for seed in self.seeds:
            texts = pl_module.response_texts(answer(pl_module, batch, self.decoding, seed, "student"))
            rows = zip(batch.ids, batch.prompt_texts, texts, batch.references, strict=False)
            self._questions += [Question(i, seed, prompt, text, accepted[0]) for i, prompt, text, accepted in rows]

    def conclude(self, trainer: Trainer, pl_module: DistillationModule, stage: Stage) -> None:
        """Ask about the responses of all ranks."""
        questions = self._gathered(trainer)
        verdict = self._ask(trainer, questions)
        if isinstance(verdict, Verdict) and verdict.scores:
            device = pl_module.device
            figures = {f"{stage}/{name}": torch.tensor(v, device=device) for name, v in verdict.figures().items()}
            pl_module.log_figures(figures)
            self._tell(verdict, len(questions))
            if stage == "test":
                self._report = self._reported(trainer, verdict)
            return
        if isinstance(verdict, Verdict):
            if verdict.not_asked == len(questions):  # there are none, or no budget at all
                self._tell(verdict, len(questions))
                return
            verdict = f"Judge.endpoint: no answer of {self.endpoint.model} could be used. {verdict.reason}"
        if trainer.state.fn == "fit":
            rank_zero_warn(f"This validation has no figures of the judge. {verdict}")
        else:
            self._error = verdict

    def teardown(self, trainer: Trainer, pl_module: DistillationModule, stage: str) -> None:
        """Say, now that all other figures are written, that the judge's are missing.

        Raises:
            ValueError: if the judge could not be asked at a test or a validation of its own.
        """
        error, self._error = self._error, None
        if error:
            raise ValueError(error)

    def _gathered(self, trainer: Trainer) -> list[Question]:
        """The questions of all ranks, on all ranks, in an order that depends on neither ranks nor subjects."""
        shares: list[Any] = [self._questions]
        if trainer.world_size > 1:
            ranks = data_ranks(trainer)
            shares = [None] * ranks.number
            dist.all_gather_object(shares, self._questions, ranks.group)

        def order(question: Question) -> tuple[int, bytes]:
            digest = hashlib.blake2b(question.id.encode(), digest_size=8).digest()
            return self.seeds.index(question.seed), digest

        return sorted((question for share in shares for question in share), key=order)

    def _ask(self, trainer: Trainer, questions: Sequence[Question]) -> Verdict | str:
        """The verdict, or what is wrong, equal on all ranks; rank 0 asks, the others hear from it every few seconds."""
        session: Session | None = None
        cache: AnswerCache | None = None
        said: Verdict | str | None = None
        try:
            while said is None:
                if trainer.is_global_zero:
                    try:
                        if session is None:
                            cache = self._open_cache(trainer)
                            self._account = self._account or Account(self.budget)
                            session = Session(
                                questions,
                                self.endpoint,
                                self._account,
                                cache,
                                swap=self.swap,
                                num_workers=self.num_workers,
                            )
                        said = session.verdict() if session.wait(HEARTBEAT) else None
                    except ValueError as error:
                        said = str(error)
                said = trainer.strategy.broadcast(said)
        finally:
            if session is not None:
                session.close()
            if cache is not None:
                cache.close()
        return said

    def _open_cache(self, trainer: Trainer) -> AnswerCache:
        path = Path(self.cache) if self.cache else Path(trainer.default_root_dir) / "judge.jsonl"
        cache = AnswerCache(path)
        if cache.unreadable_lines:
            rank_zero_info(f"{path}: {cache.unreadable_lines} lines cannot be read, and are asked again where needed.")
        return cache

    def _tell(self, verdict: Verdict, num_questions: int) -> None:
        if verdict.not_asked and not self._told:
            self._told = True
            rank_zero_warn(
                f"Judge.budget: spent; {verdict.not_asked} of {num_questions} responses were not judged, and the figures are "
                f"over {len(verdict.scores)}. Answers are cached: with a larger budget, only the rest is asked."
            )
        if left := verdict.unparsable + verdict.refused:
            rank_zero_warn(
                f"Judge: {verdict.unparsable} answers hold no scores and {verdict.refused} requests were refused; the figures "
                f"are over {len(verdict.scores)} of {num_questions} responses, without these {left}. {verdict.reason}"
            )

    def _reported(self, trainer: Trainer, verdict: Verdict) -> dict[str, Any]:
        spent = {} if self._account is None else self._account.spent()
        ratios = verdict.ratios()
        return {
            "model": self.endpoint.model,
            "swap": self.swap,
            **{name.removeprefix("judge_"): value for name, value in verdict.figures().items()},
            "count": len(verdict.scores),
            "ratios": ratios,
            "ratio_std": statistics.stdev(ratios) if len(ratios) > 1 else 0.0,
            "unparsable": verdict.unparsable,
            "refused": verdict.refused,
            "not_asked": verdict.not_asked,
            "cached": verdict.cached,
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
                for question, student, reference in verdict.scores[: self.num_samples]
            ],
        }
