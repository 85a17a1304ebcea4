"""Requests to OpenAI-compatible chat completions, by the client library `openai`; the API key is never written to disk."""

from __future__ import annotations

import json
import os
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lit_distill.evaluation.budget import CostTracker

if TYPE_CHECKING:
    from openai import OpenAIError

HEADERS = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
"""The headers that are sent, besides the API key; the library adds others about this machine and from the environment."""
MESSAGE_TOKENS = 64
"""Upper bound of the tokens that a chat template adds to a message."""


class EndpointError(ValueError):
    """The endpoint cannot be used: wrong key, wrong address, or no response. The message begins with a field of `ChatEndpoint`."""


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
    """Timeout of one attempt."""
    max_retries: int = 6
    """Number of further attempts after status 408, 409, 429 or 5xx, or after no response."""
    backoff_seconds: float | None = None
    """Deprecated, without effect: the client waits as the server asks with Retry-After, or 0.5 s, and twice as long each time."""

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url: expected https://host/v1 or http://host:port/v1, got {self.base_url!r}.")
        if address.username or address.password or address.query:
            raise ValueError(
                "base_url: contains credentials or a query. Put the key in an environment variable: api_key_env."
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds: expected a number > 0, got {self.timeout_seconds}.")
        if self.max_retries < 0:
            raise ValueError(f"max_retries: expected 0 or more, got {self.max_retries}.")
        if taken := sorted({"model", "messages", "stream"} & set(self.parameters)):
            raise ValueError(f"parameters: {taken[0]!r} cannot be set here. Remove it.")
        if self.backoff_seconds is not None:
            message = "ChatEndpoint.backoff_seconds: the client's own back-off is used; remove it."
            warnings.warn(message, FutureWarning, stacklevel=2)
            self.backoff_seconds = None

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
        if not (key and key.isascii() and key.isprintable()):
            problem = "is not a valid key: it contains control or non-ASCII characters" if key else "is not set"
            raise EndpointError(
                f"api_key_env: the environment variable {self.api_key_env} {problem}. Set it to the key of {self.base_url}, or "
                "api_key_env to the variable that holds it, or to null for an endpoint without key."
            )
        return key


class ChatClient:
    """Sends requests to an endpoint within a budget; safe to use from several threads.

    openai repeats failed requests. Redirects are not followed, because they would send the key to another host.

    Args:
        endpoint: the endpoint.
        tracker: tracks the cost and enforces the budget.

    Raises:
        EndpointError: if openai is not installed, the API key is missing or not valid, or no client can be made for the URL.
    """

    def __init__(self, endpoint: ChatEndpoint, tracker: CostTracker) -> None:
        self.endpoint, self._tracker, self._key = endpoint, tracker, endpoint.key()
        self._stopped = threading.Event()
        self._attempts = threading.local()  # of the request that a thread is sending
        try:
            import openai
        except ModuleNotFoundError as error:
            raise EndpointError(
                "a chat endpoint needs openai, which is not installed. Run: pip install 'lit-distill[judge]'"
            ) from error
        try:
            self._client = openai.OpenAI(
                base_url=endpoint.base_url,
                api_key="set by _before_attempt",
                timeout=endpoint.timeout_seconds,
                max_retries=endpoint.max_retries,
                http_client=openai.DefaultHttpxClient(
                    follow_redirects=False,
                    event_hooks={"request": [self._before_attempt], "response": [self._after_attempt]},
                ),
            )
        except Exception as error:  # httpx's InvalidURL has no other base class
            raise EndpointError(f"base_url: no client can be made for {endpoint.base_url} ({error}).") from error

    def ask(self, body: dict[str, Any]) -> str | None:
        """Send one request, with retries, and return the answer of the endpoint.

        Args:
            body: the result of `ChatEndpoint.body`.

        Returns:
            The answer, empty if the response contains none; None if the budget is spent or after `stop`.

        Raises:
            EndpointError: if no request to this endpoint can succeed.
            RequestRefusedError: if the endpoint rejects this request.
        """
        from openai import OpenAIError

        budget, endpoint = self._tracker.budget, self.endpoint
        input_bound = len(json.dumps(body)) + MESSAGE_TOKENS * len(body["messages"])  # no token is shorter than a byte
        most = budget.price(input_bound, endpoint.answer_tokens() or 0)
        reserved = most * (endpoint.max_retries + 1)
        if self._stopped.is_set() or not self._tracker.reserve(reserved):
            return None
        answer, used, cost, self._attempts.lost = "", (0, 0), 0.0, 0
        create = self._client.chat.completions.create
        try:
            with suppress(ValueError):  # the response is not JSON
                answer, used = _parse(
                    create(model=endpoint.model, messages=body["messages"], extra_body=endpoint.parameters)
                )
            cost = budget.price(*used) if any(used) else most
        except OpenAIError as error:
            if self._stopped.is_set():
                return None
            raise self._error(error) from None
        else:
            return answer
        finally:  # an attempt without response may be charged, so it counts with its maximum cost
            self._tracker.settle(reserved, *used, cost + most * self._attempts.lost)

    def stop(self) -> None:
        """Make no further attempt, in any thread; running ones may finish."""
        self._stopped.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _before_attempt(self, request: Any) -> None:
        """Removes what openai adds about the machine and the environment; an attempt is lost until its response is read."""
        from openai import OpenAIError

        if self._stopped.is_set():
            raise OpenAIError
        for name in set(request.headers) - HEADERS:
            del request.headers[name]
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        self._attempts.lost += 1

    def _after_attempt(self, response: Any) -> None:
        response.read()
        self._attempts.lost -= 1

    def _error(self, error: OpenAIError) -> ValueError:
        endpoint, response = self.endpoint, getattr(error, "response", None)
        gave_up = "Gave up; see max_retries and timeout_seconds."
        if response is None:
            reason = self._shown(f"{error} {error.__cause__ or ''}")
            return EndpointError(f"base_url: {endpoint.base_url} did not respond ({reason}). {gave_up}")
        code = response.status_code
        status = f"{endpoint.base_url} returned {code}: {self._shown(response.text or response.reason_phrase)}"
        if code in (401, 403):
            problem = f"the key in {endpoint.api_key_env} is not accepted" if self._key else "null, but a key is needed"
            return EndpointError(f"api_key_env: {problem}. {status}")
        if code == 404 or code < 400:
            return EndpointError(f"base_url: the URL or the model ({endpoint.model}) is wrong. {status}")
        if code in (408, 409, 429) or code >= 500:
            return EndpointError(f"base_url: {status}. {gave_up}")
        return RequestRefusedError(status)

    def _shown(self, text: str) -> str:
        """The beginning of a text of the endpoint, without the key."""
        return " ".join((text if self._key is None else text.replace(self._key, "***")).split())[:300]


def _parse(response: Any) -> tuple[str, tuple[int, int]]:
    """The answer and the numbers of input and output tokens; empty and 0 if the response, which openai does not check, has none."""
    try:
        answer = response.choices[0].message.content
        usage = response.usage
        used = (int(usage.prompt_tokens or 0), int(usage.completion_tokens or 0)) if usage else (0, 0)
    except (AttributeError, LookupError, TypeError, ValueError):  # counted as unparsable
        return "", (0, 0)
    return answer if isinstance(answer, str) else "", used
