"""The client of an inference server that scores given texts: batches of texts, sent from background threads."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from lit_distill.teachers.logprob_protocols import APIS, AnswerCheck, ScoredText, empty_scores
from lit_distill.teachers.server import SHOWN_OF, InferenceServer, RefusedError
from lit_distill.types.arguments import check_sizes

__all__ = ["CompletionsClient", "ScoredText", "ServedModel"]

_TOO_LONG = re.compile(r"context length|model length|max_model_len|maximum allowed length", re.IGNORECASE)
_TOO_MANY_LOGPROBS = re.compile(r"logprobs.*max allowed", re.IGNORECASE)


class ServedModel(NamedTuple):
    """A model, as the server lists it."""

    name: str
    max_model_len: int | None
    """Largest number of tokens of a text together with its answer; None if the server does not tell."""


class CompletionsClient:
    """Asks an inference server for the log-probabilities of texts; safe to use from several threads.

    Args:
        url: address of the server, such as ``http://host:8000``, with or without ``/v1``.
        model: the model's name on the server; None for the only one that it serves.
        top_k: number k of tokens in a row.
        api: the server's protocol.
        timeout: seconds without a byte from the server after which an attempt has failed.
        retries: number of further attempts after a time-out, a lost connection, or status 408, 429 or 5xx.
        num_workers: number of simultaneous requests.
        texts_per_request: largest number of texts in a request.
        key_variable: environment variable with the API key, which is sent only if the variable is set.
        backoff_seconds: wait before the second attempt. It doubles each time, up to a minute; the server's Retry-After extends it.

    Raises:
        ValueError: if an argument or the key is not valid.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        top_k: int,
        api: Literal["vllm", "sglang"] = "vllm",
        timeout: float = 300.0,
        retries: int = 8,
        num_workers: int = 8,
        texts_per_request: int = 4,
        key_variable: str = "LIT_DISTILL_TEACHER_KEY",
        backoff_seconds: float = 1.0,
    ) -> None:
        check_sizes(top_k=top_k, num_workers=num_workers, texts_per_request=texts_per_request)
        if api not in APIS:
            raise ValueError(f"api: expected {' or '.join(APIS)}, got {api!r}.")
        self.model, self.top_k, self.api, self.texts_per_request = model, top_k, api, texts_per_request
        self._server = InferenceServer(
            url, timeout=timeout, retries=retries, backoff_seconds=backoff_seconds, key_variable=key_variable
        )
        self.url = self._server.url
        self._served: ServedModel | None = None
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="teacher")

    def submit(self, texts: Sequence[list[int]], names: Sequence[str]) -> Future[list[ScoredText]]:
        """Score texts in the background.

        Args:
            texts: the token ids of each text.
            names: the id of each item, for messages.

        Returns:
            A future of the results, in the order of ``texts``; it raises what `score` raises.
        """
        assert len(texts) == len(names)
        size = self.texts_per_request
        starts = range(0, len(texts), size)
        return _joined([self._pool.submit(self._score, texts[i : i + size], names[i : i + size]) for i in starts])

    def score(self, texts: Sequence[list[int]], names: Sequence[str]) -> list[ScoredText]:
        """Score texts and wait for the results; see `submit`.

        Raises:
            ConnectionError: if no attempt got an answer, or the client was closed.
            ValueError: if the server refuses the request, or its answer cannot be a teacher's about these texts.
        """
        return self.submit(texts, names).result()

    def close(self) -> None:
        """Stop all requests, also those that the server is answering."""
        self._server.close()
        self._pool.shutdown(cancel_futures=True)

    def describe(self) -> ServedModel:
        """The model on the server, from ``GET /v1/models``.

        Raises:
            ConnectionError: if no attempt got an answer.
            ValueError: if ``model`` is not served or, without ``model``, not exactly one is.
        """
        if self._served is None:  # several threads may ask at once: the answer is the same
            listed = self._ask("GET", "/v1/models")
            try:
                served = {card["id"]: ServedModel(card["id"], card.get("max_model_len")) for card in listed["data"]}
            except (LookupError, TypeError, AttributeError) as error:
                raise self._not_an_answer("/v1/models", listed) from error
            names = ", ".join(served) or "none"
            if self.model is None and len(served) != 1:
                raise ValueError(f"model: expected the name of one that {self.url} serves: {names}.")
            if self.model is not None and self.model not in served:
                raise ValueError(
                    f"model: expected the name of one that {self.url} serves: {names}; got {self.model!r}."
                )
            self._served = served[self.model or next(iter(served))]
        return self._served

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of a text; None if the server does not tell. Raises what `describe` raises."""
        max_model_len = self.describe().max_model_len
        return None if max_model_len is None else max_model_len - 1  # both servers want room for one more

    def _score(self, texts: Sequence[list[int]], names: Sequence[str]) -> list[ScoredText]:
        """The results for the texts of one request. Texts of one token are not sent, since nothing in them is predicted."""
        api, sent = APIS[self.api], [text for text in texts if len(text) > 1]
        answers = []
        if sent:
            model = self.describe().name if self.model is None and self.api == "vllm" else self.model
            content = self._ask("POST", api.path, api.request(model, sent, self.top_k), (texts, names))
            try:
                answers = api.answers(content)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise self._not_an_answer(api.path, content) from error
        if len(answers) != len(sent):
            raise ValueError(f"url: {self.url}{api.path} returned {len(answers)} results for {len(sent)} texts.")
        rest = iter(answers)
        return [
            AnswerCheck(self.url, name, text, self.top_k, api.allow_more).scores(next(rest))
            if len(text) > 1
            else empty_scores(len(text), self.top_k)
            for text, name in zip(texts, names, strict=True)
        ]

    def _ask(self, method: str, path: str, body: Any = None, items: tuple[Any, Any] = ((), ())) -> Any:
        try:
            return self._server.ask(method, path, body)
        except RefusedError as error:
            raise ValueError(self._refusal(error, path, *items)) from error

    def _refusal(self, error: RefusedError, path: str, texts: Sequence[list[int]], names: Sequence[str]) -> str:
        """What a refusal means, for the reader of the YAML."""
        answer = f"{self.url}{path} returned {error}"
        if error.status in {401, 403}:
            variable = self._server.key_variable
            problem = (
                f"the key in {variable} is not accepted"
                if self._server.key()
                else f"it asks for a key, and {variable} is not set"
            )
            return f"url: {problem}. Set this environment variable to the server's key. {answer}"
        if error.status in {404, 405} or error.status < 400:
            return f"url: the address, api ({self.api}) or model ({self.model}) is wrong. {answer}"
        if _TOO_MANY_LOGPROBS.search(error.reason):
            return f"top_k: {self.top_k} is more than the server allows. Lower it, or {APIS[self.api].allow_more}. {answer}"
        if _TOO_LONG.search(error.reason) and texts:
            tokens, name = max((len(text), name) for text, name in zip(texts, names, strict=True))
            return (
                f"url: {name} has {tokens} tokens, and the server needs max_model_len >= tokens + 1 = {tokens + 1}. Start it with "
                f"a larger --max-model-len (SGLang: --context-length), or shorten the texts. {answer}"
            )
        return f"url: the request for {', '.join(names) or path} was refused. {answer}"

    def _not_an_answer(self, path: str, content: Any) -> ValueError:
        begin = self._server.shown(json.dumps(content)[:SHOWN_OF])
        return ValueError(f"url: {self.url}{path} does not answer as {self.api} does, see api. It returned {begin}")


def _joined(parts: list[Future[list[ScoredText]]]) -> Future[list[ScoredText]]:
    """A future of all results, in order. The first error ends it, and cancels the parts that have not begun."""
    whole: Future[list[ScoredText]] = Future()
    whole.set_running_or_notify_cancel()
    lock, missing = threading.RLock(), set(parts)  # reentrant: cancelling a part ends it

    def end(part: Future[list[ScoredText]]) -> None:
        with lock:
            missing.discard(part)
            if whole.done():
                return
            if part.cancelled():
                whole.set_exception(ConnectionError("url: the client was closed before the requests were sent."))
            elif (error := part.exception()) is not None:
                whole.set_exception(error)
                for other in list(missing):
                    other.cancel()
            elif not missing:
                whole.set_result([result for done in parts for result in done.result()])

    for part in parts:
        part.add_done_callback(end)
    if not parts:
        whole.set_result([])
    return whole
