"""A client for OpenAI-compatible chat completions: failed requests are retried, and the API key is never written to disk."""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from lit_distill.evaluation.budget import CostTracker

KEY = "Judge.endpoint"
LONGEST_WAIT = 600.0
"""Seconds; if the next attempt would have to wait longer, the endpoint counts as unavailable."""
MESSAGE_TOKENS = 64
"""Upper bound of the tokens that a chat template adds to a message."""


class EndpointError(ValueError):
    """The endpoint cannot be used: wrong key, wrong address, or no response."""


class RequestRefusedError(ValueError):
    """The endpoint works, but rejects this request, for example because the text is too long."""


@dataclass
class ChatEndpoint:
    """The endpoint, its model, and how often and how long to try."""

    base_url: str
    """URL of the API, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``."""
    model: str
    """Name of the model at the endpoint."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """The environment variable with the API key, which is never written to disk; null for an endpoint without a key."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    """Further fields of the request body."""
    timeout_seconds: float = 60.0
    """Timeout of one request."""
    max_retries: int = 6
    """Number of further attempts after status 408, 409, 429 or 5xx, or after no response."""
    backoff_seconds: float = 1.0
    """Wait before the second attempt; it doubles with each attempt, unless the server sends Retry-After."""

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{KEY}.base_url: expected https://host/v1 or http://host:port/v1, got {self.base_url!r}.")
        if address.username or address.password or address.query:
            raise ValueError(
                f"{KEY}.base_url: contains credentials or a query. Put the key in an environment variable (api_key_env)."
            )
        for name in ("timeout_seconds", "backoff_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{KEY}.{name}: expected a number > 0, got {getattr(self, name)}.")
        if self.max_retries < 0:
            raise ValueError(f"{KEY}.max_retries: expected 0 or more, got {self.max_retries}.")
        if taken := sorted({"model", "messages", "stream"} & set(self.parameters)):
            raise ValueError(f"{KEY}.parameters: {taken[0]!r} cannot be set here. Remove it.")

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request body: everything that the answer depends on."""
        return {"model": self.model, "messages": messages, **self.parameters}

    def answer_tokens(self) -> int | None:
        """The maximum number of tokens of an answer; None without a limit."""
        limits = [self.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
        return next((int(limit) for limit in limits if limit is not None), None)

    def key(self) -> str | None:
        """The API key, from the environment; None for an endpoint without a key.

        Raises:
            EndpointError: if the variable is not set or its value is not a valid key.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise EndpointError(
                f"{KEY}.api_key_env: the environment variable {self.api_key_env} is not set. Set it to the key of "
                f"{self.base_url}, or api_key_env to the variable that holds it, or to null for an endpoint without key."
            )
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(
                f"{KEY}.api_key_env: the value of {self.api_key_env} is not a valid key: it contains control or non-ASCII "
                "characters. Set it to the key."
            )
        return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(
    endpoint: ChatEndpoint, tracker: CostTracker, body: dict[str, Any], key: str | None, stop: threading.Event
) -> str | None:
    """Send one request, with retries, and return the answer of the endpoint.

    Args:
        endpoint: the endpoint.
        tracker: tracks the cost and enforces the budget.
        body: the result of `ChatEndpoint.body`.
        key: the result of `ChatEndpoint.key`.
        stop: if another thread sets it, waiting ends and no further attempt is made.

    Returns:
        The answer, empty if the response contains none; None if the budget is spent or ``stop`` is set.

    Raises:
        EndpointError: if no request to this endpoint can succeed.
        RequestRefusedError: if the endpoint rejects this request, or the budget allows no further attempt.
    """
    data = json.dumps(body).encode()
    input_bound = len(data) + MESSAGE_TOKENS * len(body["messages"])  # no token is shorter than a byte
    most = tracker.budget.price(input_bound, endpoint.answer_tokens() or 0)
    problem = ""
    for attempt in range(endpoint.max_retries + 1):
        if stop.is_set() or not tracker.reserve(most):
            if problem and not stop.is_set():
                raise RequestRefusedError(f"{problem} The budget allows no further attempt.")
            return None
        used, cost = (0, 0), 0.0
        try:
            response = _post(endpoint, data, key)
            answer, used = _parse(response)
            cost = most if used == (0, 0) else tracker.budget.price(*used)
        except urllib.error.HTTPError as error:
            problem, pause = _problem(endpoint, error, key), _retry_after(error.headers)
        except (OSError, HTTPException) as error:
            cost = most  # the endpoint may have generated an answer that was lost: count its maximum cost
            problem, pause = f"{KEY}.base_url: {endpoint.base_url} did not respond ({_reason(error)}).", None
        else:
            return answer
        finally:
            tracker.settle(most, *used, cost)
        wait = endpoint.backoff_seconds * 2**attempt * random.uniform(0.75, 1.25) if pause is None else pause
        if attempt == endpoint.max_retries or wait > LONGEST_WAIT:
            raise EndpointError(f"{problem} Gave up after {attempt + 1} attempts; see max_retries and timeout_seconds.")
        stop.wait(wait)
    raise AssertionError("the last attempt returns or raises")


def _post(endpoint: ChatEndpoint, data: bytes, key: str | None) -> bytes:
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
    address = endpoint.base_url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(address, data, headers)  # noqa: S310 - the scheme is checked: http or https
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=endpoint.timeout_seconds) as response:
        content: bytes = response.read()
    return content


def _parse(content: bytes) -> tuple[str, tuple[int, int]]:
    """The answer and the numbers of input and output tokens; empty and 0 if the response has another format."""
    try:
        response = json.loads(content)
        answer = response["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):  # counted as unparsable
        return "", (0, 0)
    usage = response.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    used = int(counts.get("prompt_tokens") or 0), int(counts.get("completion_tokens") or 0)
    return answer if isinstance(answer, str) else "", used


def _problem(endpoint: ChatEndpoint, error: urllib.error.HTTPError, key: str | None) -> str:
    """The error message for a status that is worth a retry; raises for any other status."""
    text = error.read(2000).decode(errors="replace")
    text = " ".join((text if key is None else text.replace(key, "***")).split())[:300]
    status = f"{endpoint.base_url} returned {error.code}: {text or error.reason}"
    if error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise EndpointError(f"{KEY}.api_key_env: the key in {endpoint.api_key_env} is not accepted. {status}")
    if error.code == HTTPStatus.NOT_FOUND or error.code < 400:
        raise EndpointError(f"{KEY}.base_url or {KEY}.model ({endpoint.model}) is wrong. {status}")
    if (
        error.code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS)
        or error.code >= 500
    ):
        return f"{KEY}.base_url: {status}."
    raise RequestRefusedError(f"{KEY}: {status}")


def _retry_after(headers: Message) -> float | None:
    """Seconds to wait according to the header Retry-After, a number or a date; None without it."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:  # neither a number nor a date: ignored
        return None


def _reason(error: BaseException) -> str:
    """The error in a few words: an address or a reason, never a header, so never the key."""
    return str(getattr(error, "reason", None) or error or type(error).__name__)
