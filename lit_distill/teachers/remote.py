"""A teacher on an inference server: it returns the log-probabilities of its k most probable tokens and of the text's own.

The requests of an optimiser step are sent before the student runs, so that both work at the same time. What is returned is checked
token by token (`logprob_protocols`); a server that scored other tokens, or shifted them, ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_distill.functional.host import to_device
from lit_distill.objectives import Accuracy
from lit_distill.teachers.base import LoadedTeacher, Opening, Prepared, Teacher, TeacherRows
from lit_distill.teachers.completions import CompletionsClient, ScoredText
from lit_distill.teachers.sparse import Tail, TopKRows
from lit_distill.teachers.store import Text, texts_of
from lit_distill.types import ArgumentError, arguments_of, check_sizes

if TYPE_CHECKING:
    from lit_distill.models import CausalLM
    from lit_distill.types import Sequences


class ServerTeacher(Teacher):
    """A teacher behind an OpenAI-compatible server: vLLM, or SGLang. The server's tokenizer must be the student's.

    If the server asks for a key, set the environment variable LIT_DISTILL_TEACHER_KEY.

    Args:
        url: of the server, such as http://localhost:8000.
        model: its name on the server; not needed if the server has one model.
        api: vllm (``/v1/completions`` with ``prompt_logprobs``) or sglang (``/generate``).
        top_k: log-probabilities of each token; vLLM allows 20 unless it was started with ``--max-logprobs``.
        tail: spread the probability that the k tokens leave evenly over the other tokens, or "renormalize" the k; both bias the
            student.
        timeout: seconds without an answer after which a request is tried again.
        retries: how often.
        num_workers: requests at the same time.
        texts_per_request: texts in a request.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api: Literal["vllm", "sglang"] = "vllm",
        top_k: int = 20,
        tail: Tail = "spread",
        timeout: float = 300.0,
        retries: int = 8,
        num_workers: int = 8,
        texts_per_request: int = 4,
    ) -> None:
        check_sizes(top_k=top_k, num_workers=num_workers, texts_per_request=texts_per_request)
        if tail not in ("spread", "renormalize"):
            raise ValueError(f"tail: expected 'spread' or 'renormalize', got {tail!r}.")
        self.url = url
        self.model = model
        self.top_k = top_k
        self.tail: Tail = tail
        self._settings: dict[str, Any] = {
            "api": api,
            "timeout": timeout,
            "retries": retries,
            "num_workers": num_workers,
            "texts_per_request": texts_per_request,
        }
        self._client: CompletionsClient | None = None
        self._pending: dict[tuple[int, int], tuple[Future[list[ScoredText]], int]] = {}
        self._learnt = Prepared(lambda sequences: [text for text in texts_of(sequences) if text.targets.any()])
        self._vocabulary_size = 0
        self._ids = 0

    @property
    def accuracy(self) -> Accuracy:  # type: ignore[override]
        """That of the tail."""
        return "spread" if self.tail == "spread" else "truncated"

    @property
    def known_tokens(self) -> int:
        """Those that are asked for."""
        return self.top_k

    def open(self, opening: Opening, key: str) -> int | None:
        """The student's tokens: the server does not say which it has."""
        self._ids = min(opening.student_rows, max(opening.tokenizer.get_vocab().values()) + 1)
        return self._ids

    def load(self, vocabulary_size: int | None, student: CausalLM | None) -> LoadedTeacher:
        """Ask the server for its model.

        Raises:
            ValueError: beginning with the argument, if it does not answer or does not have the model.
        """
        self._vocabulary_size = vocabulary_size or self._ids
        with self._named_errors():
            self._client = CompletionsClient(self.url, self.model, top_k=self.top_k, **self._settings)
            found = self._client.describe()
        note = "the rest is spread evenly over the others" if self.tail == "spread" else "the others are left out"
        rank_zero_info(
            f"Teacher {found.name} at {self.url}: the {self.top_k} most probable tokens are exact, and {note}, which biases the "
            "student."
        )
        return self

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the argument in the error of a server that cannot be reached too."""
        try:
            with arguments_of(self):
                yield
        except ConnectionError as error:
            raise ArgumentError(self, str(error)) from error

    def prefetch(self, sequences: Sequences) -> None:
        """Send the requests for the texts of a micro-batch."""
        assert self._client is not None
        texts = [text for text in self._learnt.ahead(sequences) if text.key not in self._pending]
        with arguments_of(self):
            self._check_lengths(texts)
        size = self._client.texts_per_request
        for first in range(0, len(texts), size):
            part = texts[first : first + size]
            answer = self._client.submit([text.tokens.tolist() for text in part], [text.name for text in part])
            self._pending |= {text.key: (answer, place) for place, text in enumerate(part)}

    def _check_lengths(self, texts: list[Text]) -> None:
        assert self._client is not None
        limit = self._client.limit
        for text in texts:
            if limit is not None and len(text.tokens) > limit:
                raise ValueError(
                    f"url: the item {text.name!r} has {len(text.tokens)} tokens, but {self.url} takes at most {limit}. Start the "
                    "server with a larger --max-model-len (SGLang: --context-length), or set data.init_args.max_length."
                )

    def rows(self, sequences: Sequences) -> TeacherRows:
        """The rows of all targets; waits for the server when their logits are asked for first."""
        self.prefetch(sequences)
        wanted = self._learnt.take(sequences)
        answers = [self._pending[text.key] for text in wanted]
        for text in wanted:
            self._pending.pop(text.key, None)
        labels = sequences.input_ids.flatten()[sequences.target_index]
        return _ServerRows(self, wanted, answers, labels)

    def collect(
        self, texts: list[Text], answers: list[tuple[Future[list[ScoredText]], int]], labels: Tensor
    ) -> TopKRows:
        """Wait for the answers, and keep the rows of the targets."""
        try:
            with self._named_errors():
                scored = [answer.result()[place] for answer, place in answers]
        except BaseException:
            self.close()  # or the interpreter would wait for the other requests
            raise
        ids, logprobs, exact = (
            [torch.zeros(0, self.top_k, dtype=torch.int64)],
            [torch.zeros(0, self.top_k)],
            [torch.zeros(0)],
        )
        for text, one in zip(texts, scored, strict=True):
            targets = torch.from_numpy(text.targets)
            ids.append(one.ids[targets])
            logprobs.append(one.logprobs[targets])
            exact.append(one.label_logprobs[targets])
        joined = torch.cat(ids)
        if len(joined) and int(joined.max()) >= self._vocabulary_size:
            raise ArgumentError(
                self,
                f"url: {self.url} gives the token {int(joined.max())} a probability, but the student has only "
                f"{self._vocabulary_size} tokens. Serve the model whose tokenizer is the student's, or lower top_k if its head "
                "has more rows than tokens.",
            )
        device = labels.device
        return TopKRows(
            to_device(joined, device),
            to_device(torch.cat(logprobs), device),
            labels,
            to_device(torch.cat(exact), device),
            self._vocabulary_size,
            self.tail,
        )

    def close(self) -> None:
        """Stop the requests that are under way."""
        self._pending = {}
        if self._client is not None:
            self._client.close()

    def identity(self, key: str) -> dict[str, Any]:
        """The model's name on the server."""
        return {"path": self.model or self.url, "revision": None, "layers": [None, None], "content": None}

    @property
    def description(self) -> str:
        """Model and address."""
        return f"{self.model or 'the model'} at {self.url}"


class _ServerRows:
    """`TeacherRows` that wait for the server when they are first asked."""

    def __init__(
        self,
        teacher: ServerTeacher,
        texts: list[Text],
        answers: list[tuple[Future[list[ScoredText]], int]],
        labels: Tensor,
    ) -> None:
        self._wanted = teacher, texts, answers, labels
        self._rows: TopKRows | None = None

    def _ready(self) -> TopKRows:
        if self._rows is None:
            teacher, texts, answers, labels = self._wanted
            self._rows = teacher.collect(texts, answers, labels)
        return self._rows

    def logits(self, rows: slice) -> Tensor:
        """See `TeacherRows`."""
        return self._ready().logits(rows)

    def label_logprobs(self, labels: Tensor, chunk_rows: int | None = None) -> Tensor:
        """See `TeacherRows`."""
        return self._ready().label_logprobs(labels, chunk_rows)
