"""A client of OpenAI-compatible chat completions: attempts are repeated with patience, and the key is written nowhere."""

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
    from lit_distill.evaluation.budget import Account

KEY = "Judge.endpoint"
LONGEST_WAIT = 600.0
"""Seconds; a server that asks for more patience than this is as good as down."""
MESSAGE_TOKENS = 64
"""More than any chat template adds to a message."""


class EndpointError(ValueError):
    """The endpoint cannot be used: wrong key, wrong address, or nobody answers."""


class RequestRefusedError(ValueError):
    """The endpoint works, but does not take this one request, as with a text that is too long for it."""


@dataclass
class ChatEndpoint:
    """Who is asked, and how patiently."""

    base_url: str
    """Of the API, such as ``https://api.openai.com/v1`` or ``http://localhost:8000/v1``."""
    model: str
    """Its name at the endpoint."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key, which is read when needed and never written; null for an endpoint without."""
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0, "max_tokens": 512})
    """Further fields of the request."""
    timeout_seconds: float = 60.0
    """Longest silence of one request."""
    max_retries: int = 6
    """Further attempts after status 408, 409, 429 or 5xx, or no answer at all."""
    backoff_seconds: float = 1.0
    """First pause between attempts; each further one is twice as long, unless the server says for how long (Retry-After)."""

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{KEY}.base_url: expected https://host/v1 or http://host:port/v1, got {self.base_url!r}.")
        if address.username or address.password or address.query:
            raise ValueError(
                f"{KEY}.base_url: holds credentials or a query. A key belongs into an environment variable."
            )
        for name in ("timeout_seconds", "backoff_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{KEY}.{name}: expected a number > 0, got {getattr(self, name)}.")
        if self.max_retries < 0:
            raise ValueError(f"{KEY}.max_retries: expected 0 or more, got {self.max_retries}.")
        if taken := sorted({"model", "messages", "stream"} & set(self.parameters)):
            raise ValueError(f"{KEY}.parameters: {taken[0]!r} is not to be set here. Remove it.")

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request as the endpoint gets it; all that its answer depends on."""
        return {"model": self.model, "messages": messages, **self.parameters}

    def answer_tokens(self) -> int | None:
        """The most tokens that an answer may have, if that is limited."""
        limits = [self.parameters.get(name) for name in ("max_completion_tokens", "max_tokens")]
        return next((int(limit) for limit in limits if limit is not None), None)

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            EndpointError: if it is not there, or cannot be one.
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
                f"{KEY}.api_key_env: what {self.api_key_env} holds is no key: it has control characters."
            )
        return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(
    endpoint: ChatEndpoint, account: Account, body: dict[str, Any], key: str | None, stop: threading.Event
) -> str | None:
    """The endpoint's answer to one request.

    Args:
        endpoint: who is asked.
        account: who pays.
        body: of `ChatEndpoint.body`.
        key: of `ChatEndpoint.key`.
        stop: set by others to end the waiting.

    Returns:
        The answer, empty if there is none in the response; None if the budget is spent or ``stop`` is set.

    Raises:
        EndpointError: if no request can succeed.
        RequestRefusedError: if this one cannot.
    """
    data = json.dumps(body).encode()
    input_bound = len(data) + MESSAGE_TOKENS * len(body["messages"])  # no token is shorter than a byte
    most = account.budget.price(input_bound, endpoint.answer_tokens() or 0)
    problem = ""
    for attempt in range(endpoint.max_retries + 1):
        if stop.is_set() or not account.reserve(most):
            if problem and not stop.is_set():
                raise RequestRefusedError(f"{problem} The budget leaves no further attempt.")
            return None
        used, cost = (0, 0), 0.0
        try:
            response = _post(endpoint, data, key)
            answer, used = _read(response)
            cost = most if used == (0, 0) else account.budget.price(*used)
        except urllib.error.HTTPError as error:
            problem, pause = _problem(endpoint, error, key), _retry_after(error.headers)
        except (OSError, HTTPException) as error:
            cost = most  # it may have been answered, and the answer lost
            problem, pause = f"{KEY}.base_url: {endpoint.base_url} does not answer ({_named(error)}).", None
        else:
            return answer
        finally:
            account.settle(most, *used, cost)
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


def _read(content: bytes) -> tuple[str, tuple[int, int]]:
    """The answer and its input and output tokens; empty and 0 where the response has another form."""
    try:
        response = json.loads(content)
        answer = response["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):  # told from an answer without scores by nobody: both are counted
        return "", (0, 0)
    usage = response.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    used = int(counts.get("prompt_tokens") or 0), int(counts.get("completion_tokens") or 0)
    return answer if isinstance(answer, str) else "", used


def _problem(endpoint: ChatEndpoint, error: urllib.error.HTTPError, key: str | None) -> str:
    """What a status that is worth another attempt means, for the day when attempts run out; raises at others."""
    said = error.read(2000).decode(errors="replace")
    said = " ".join((said if key is None else said.replace(key, "***")).split())[:300]
    status = f"{endpoint.base_url} answered {error.code}: {said or error.reason}"
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
    """Seconds to wait, if the server says so: a number, or a date."""
    said = headers.get("Retry-After")
    if said is None:
        return None
    try:
        return max(float(said), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except ValueError:  # neither: as if it had not been said
        return None


def _named(error: BaseException) -> str:
    """The error in a few words; its own text holds addresses and reasons, but no headers."""
    return str(getattr(error, "reason", None) or error or type(error).__name__)
