"""How two inference servers are asked for the log-probabilities of given texts, and what their answers must satisfy.

| | vLLM | SGLang |
|---|---|---|
| request | ``prompt`` (ids of each text), ``max_tokens`` 1, ``prompt_logprobs`` k | ``input_ids``, ``max_new_tokens`` 0, \
``return_logprob``, ``logprob_start_len`` 0, ``top_logprobs_num`` k |
| k first tokens | ``choices[i].prompt_logprobs``: ``{id: {logprob, rank, ...}}``, with a further entry for the text's own token \
if it is not among the k | ``meta_info.input_top_logprobs``: ``[logprob, id, text]`` |
| own tokens | in the same entries | ``meta_info.input_token_logprobs``: ``[logprob, id, text]`` |
| token 0 | null | null; a null log-probability |
| ids scored | ``choices[i].prompt_token_ids``, with ``return_token_ids`` | in ``input_token_logprobs``; 0 for the vocabulary's \
last id |
| largest k | ``--max-logprobs``, 20 by default | the vocabulary |

Both give the plain log-softmax, whatever the other sampling parameters are. vLLM gives logits instead with ``--logprobs-mode
raw_logits`` or ``processed_logits``; these are refused, since their exponentials do not add up to 1.

Source: vLLM, vllm/entrypoints/openai/completion/protocol.py and serving.py, vllm/v1/worker/gpu/sample/prompt_logprob.py; SGLang,
python/sglang/srt/managers/io_struct.py and scheduler_components/logprob_result_processor.py; both as of 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-2
"""Largest difference of two values of one log-probability."""
OTHER_TOKENS = (
    "Serve the model whose tokenizer made these ids; if it is served, the server shifts tokens: use another version."
)


class ScoredText(NamedTuple):
    """The teacher's predictions of a text of T tokens. Row t predicts token t; row 0 is zero, since nothing predicts token 0."""

    ids: Tensor
    """``[T, k]`` int64: the k most probable tokens, the most probable first."""
    logprobs: Tensor
    """``[T, k]`` float32: their log-probabilities, normalised over the whole vocabulary."""
    label_logprobs: Tensor
    """``[T]`` float32: those of the text's own tokens, whether or not they are among the k."""


class Answer(NamedTuple):
    """What a server returned for a text of T tokens. Rows are those of tokens 1 to T - 1."""

    scored_ids: list[int] | None
    """The T ids that the server says it has scored; None if it does not say."""
    ids: list[list[int]]
    logprobs: list[list[float]]
    label_logprobs: list[float] | None
    """Of the text's own tokens, unless they are in the rows."""


class Api(NamedTuple):
    """A protocol: where and what to send, and how to read the answer."""

    path: str
    request: Callable[[str | None, Sequence[list[int]], int], dict[str, Any]]
    """The body, from the model's name, the ids of each text, and k."""
    answers: Callable[[Any], list[Answer]]
    """The answer for each text. Raises LookupError, TypeError, ValueError or AttributeError if the content is something else."""
    allow_more: str
    """What to do on the server for a larger k."""


def _vllm_request(model: str | None, texts: Sequence[list[int]], k: int) -> dict[str, Any]:
    sampling = {"max_tokens": 1, "temperature": 1.0}
    return {"model": model, "prompt": list(texts), **sampling, "prompt_logprobs": k, "return_token_ids": True}


def _vllm_answers(content: Any) -> list[Answer]:
    return [
        Answer(
            choice.get("prompt_token_ids"),
            [[int(token) for token in row] for row in choice["prompt_logprobs"][1:]],
            [[_number(entry["logprob"]) for entry in row.values()] for row in choice["prompt_logprobs"][1:]],
            None,
        )
        for choice in sorted(content["choices"], key=lambda choice: choice["index"])
    ]


def _sglang_request(model: str | None, texts: Sequence[list[int]], k: int) -> dict[str, Any]:  # noqa: ARG001 - one is loaded
    sampling = {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}  # not the model's own
    scores = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}
    return {"input_ids": list(texts), "sampling_params": sampling, **scores}


def _sglang_answers(content: Any) -> list[Answer]:
    answers = [text["meta_info"] for text in content]
    return [
        Answer(
            [int(entry[1]) for entry in answer["input_token_logprobs"]],
            [[int(entry[1]) for entry in row] for row in answer["input_top_logprobs"][1:]],
            [[_number(entry[0]) for entry in row] for row in answer["input_top_logprobs"][1:]],
            [_number(entry[0]) for entry in answer["input_token_logprobs"][1:]],
        )
        for answer in answers
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)  # servers write nan and inf as null


APIS = {
    "vllm": Api("/v1/completions", _vllm_request, _vllm_answers, "start vLLM with a larger --max-logprobs (-1: any)"),
    "sglang": Api("/generate", _sglang_request, _sglang_answers, "use a version of SGLang that returns as many"),
}


def empty_scores(num_tokens: int, k: int) -> ScoredText:
    """The rows of tokens that nothing predicts."""
    return ScoredText(torch.zeros(num_tokens, k).long(), torch.zeros(num_tokens, k), torch.zeros(num_tokens))


class AnswerCheck:
    """Checks the answer to one text: it must be a teacher's, about these tokens, and nothing else.

    Args:
        url: address of the server, for messages.
        name: id of the item, for messages.
        sent: the T token ids of the text.
        k: number of tokens in a row.
        allow_more: what to do on the server for a larger k.
    """

    def __init__(self, url: str, name: str, sent: Sequence[int], k: int, allow_more: str) -> None:
        self.url, self.name, self.sent, self.k, self.allow_more = url, name, sent, k, allow_more

    def scores(self, answer: Answer) -> ScoredText:
        """The k most probable tokens of each row, and the log-probabilities of the text's own tokens.

        Raises:
            ValueError: if the answer is about other tokens, has too few entries, or has numbers that are not the
                log-probabilities of one distribution.
        """
        self._check_sizes(answer)
        self._check_scored_ids(answer)
        values, ids = _matrix(answer.logprobs, self.k + 1, -math.inf), _matrix(answer.ids, self.k + 1, -1)
        empty = torch.arange(self.k + 1) >= torch.tensor([[len(row)] for row in answer.ids])
        self._refuse(~(values.isfinite() | empty).all(1), "a log-probability that is not finite")
        repeated = (ids.sort(1).values.diff(dim=1) == 0).any(1)
        self._refuse(((ids < 0) & ~empty).any(1) | repeated, "a token twice, or a negative id,")
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        label, among = self._labels(answer, ids, values)
        mass = values.exp().sum(1) + label.exp().where(~among, 0.0)
        vllm = answer.label_logprobs is None
        remedy = " Start vLLM without --logprobs-mode, or with a mode of logprobs." if vllm else ""
        self._refuse(mass > 1 + 1e-3, "probabilities that add up to more than 1", remedy)
        # the further entry is the text's own token, which then is less probable than the k; so is one that is in no entry
        bound = values[:, -1].where(~empty[:, -1], values[:, -2].where(~among, math.inf))
        self._refuse(label > bound + TOLERANCE, "log-probabilities of another token", f" {OTHER_TOKENS}")
        rows = ScoredText(ids[:, :-1], values[:, :-1].float(), label.float())
        return ScoredText(*(torch.cat(pair) for pair in zip(empty_scores(1, self.k), rows, strict=True)))

    def _check_sizes(self, answer: Answer) -> None:
        counts = [len(part) + 1 for part in (answer.ids, answer.label_logprobs) if part is not None]
        counts += [] if answer.scored_ids is None else [len(answer.scored_ids)]
        for count in counts:
            if count != len(self.sent):
                raise ValueError(
                    f"url: {self.url} scored {count} tokens of {self.name}, but {len(self.sent)} were sent. {OTHER_TOKENS}"
                )
        for token, row in enumerate(answer.ids, start=1):
            if not self.k <= len(row) <= self.k + 1:
                raise ValueError(
                    f"top_k: {self.url} returned {len(row)} instead of {self.k} log-probabilities for token {token} of "
                    f"{self.name}. Lower top_k, or {self.allow_more}."
                )

    def _check_scored_ids(self, answer: Answer) -> None:
        largest = max(map(max, answer.ids))
        for token, (sent, scored) in enumerate(zip(self.sent, answer.scored_ids or self.sent, strict=True)):
            if scored != sent and not (scored == 0 and sent >= largest):  # SGLang writes 0 for the vocabulary's last id
                self._refuse_token(token, f"it scored {scored}")

    def _labels(self, answer: Answer, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of the text's own token in each row, and whether the row has an entry for it."""
        entry = ids == torch.tensor(self.sent[1:])[:, None]
        among, label = entry.any(1), values.where(entry, -math.inf).amax(1)
        if answer.label_logprobs is None:
            for row in (~among).nonzero()[:1, 0].tolist():
                self._refuse_token(
                    row + 1, f"its entries are for {', '.join(map(str, answer.ids[row][:4]))} and others"
                )
            return label, among
        own = torch.tensor(answer.label_logprobs, dtype=torch.float64)
        self._refuse(~own.isfinite(), "a log-probability that is not finite")
        differs = among & ((own - label).abs() > TOLERANCE)
        self._refuse(differs, "log-probabilities of another token", f" {OTHER_TOKENS}")
        return label.where(among, own), among

    def _refuse_token(self, token: int, came_back: str) -> None:
        raise ValueError(
            f"url: {self.url} did not score the ids that were sent: token {token} of {self.name} is {self.sent[token]}, but "
            f"{came_back}. {OTHER_TOKENS}"
        )

    def _refuse(self, wrong: Tensor, what: str, remedy: str = "") -> None:
        for row in wrong.nonzero()[:1, 0].tolist():
            token = row + 1  # row 0 is that of token 1
            raise ValueError(
                f"url: {self.url} returned {what} for token {token} of {self.name}, which is {self.sent[token]}.{remedy}"
            )


def _matrix(rows: list[list[Any]], width: int, fill: float) -> Tensor:
    """``[len(rows), width]``: int64 if ``fill`` is an integer, else float64."""
    dtype = torch.int64 if isinstance(fill, int) else torch.float64
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=dtype)
