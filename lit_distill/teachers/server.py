"""JSON requests to an inference server, repeated while it cannot be reached; the API key is neither stored nor shown."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lightning.pytorch.utilities import rank_zero_warn

CONNECT_SECONDS = 10.0
"""Longest wait for a connection, which a server accepts long before it has an answer."""
MAX_WAIT_SECONDS = 60.0
"""Longest wait between two attempts, even if the server asks for more."""


SHOWN_OF = 10_000
"""Characters of a long answer that messages are made from; cutting comes after the key is hidden, so that none of it is left."""


class RefusedError(Exception):
    """The server's answer is a status that does not change with further attempts.

    Args:
        status: the HTTP status.
        reason: the beginning of the server's explanation.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class _TemporaryError(Exception):
    """An attempt that is worth repeating, after ``wait`` seconds if the server has asked for it."""

    def __init__(self, cause: str, wait: float = 0.0) -> None:
        super().__init__(cause)
        self.wait = wait


class InferenceServer:
    """A server that answers JSON requests; safe to use from several threads.

    It follows neither proxies nor redirects. The API key is read from the environment for each request.

    Args:
        url: address, such as ``http://host:8000``, with or without ``/v1``.
        timeout: seconds without a byte from the server after which an attempt has failed.
        retries: number of further attempts after a time-out, a lost connection, or status 408, 429 or 5xx.
        backoff_seconds: wait before the second attempt. It doubles each time, up to a minute; the server's Retry-After extends it.
        key_variable: environment variable with the API key, which is sent only if the variable is set.

    Raises:
        ValueError: if an argument or the key is not valid.
    """

    def __init__(self, url: str, *, timeout: float, retries: int, backoff_seconds: float, key_variable: str) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout: expected a number > 0, got {timeout}.")
        if retries < 0:
            raise ValueError(f"retries: expected 0 or more, got {retries}.")
        address = _address(url, key_variable)
        self.url, self.key_variable, self._address = address.geturl(), key_variable, address
        self._timeout, self._retries, self._backoff_seconds = timeout, retries, backoff_seconds
        self.key()
        self._unwarned, self._closed = threading.Lock(), threading.Event()
        self._connections: set[HTTPConnection] = set()

    def key(self) -> str:
        """The API key; empty without one.

        Raises:
            ValueError: if it could not be sent. The message does not contain it.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"url: the environment variable {self.key_variable} is not a valid key: it contains control or "
                "non-ASCII characters."
            )
        return key

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to one request.

        Args:
            method: ``GET`` or ``POST``.
            path: path below the address.
            body: sent as JSON.

        Raises:
            ConnectionError: if no attempt got an answer, or the server was closed.
            RefusedError: if the server refuses the request.
            ValueError: if the answer is not JSON.
        """
        data = None if body is None else json.dumps(body).encode()
        begin, wait, attempts = time.monotonic(), self._backoff_seconds, 0
        while not self._closed.is_set():
            attempts += 1
            try:
                return self._answer(method, path, data)
            except _TemporaryError as error:
                if self._closed.is_set():
                    break
                if attempts > self._retries:
                    raise ConnectionError(
                        f"url: {self.url}{path} did not answer in {attempts} attempts within {time.monotonic() - begin:.0f} s; the "
                        f"last one ended with {error}. Start the server, then resume the run with --ckpt_path last. timeout and "
                        "retries set how long is waited."
                    ) from error
                self._warn(error)
                self._closed.wait(min(max(wait, error.wait), MAX_WAIT_SECONDS))
                wait *= 2
        raise ConnectionError(f"url: the requests to {self.url} were stopped.")

    def close(self) -> None:
        """Stop all requests, also those that the server is answering."""
        self._closed.set()
        for connection in list(self._connections):
            with suppress(OSError, AttributeError):  # AttributeError: it has ended in the meantime
                connection.sock.shutdown(SHUT_RDWR)

    def shown(self, text: str) -> str:
        """The beginning of a text from the server, in one line and without the key."""
        key = self.key()
        return " ".join((text.replace(key, "***") if key else text).split())[:300]

    def _answer(self, method: str, path: str, data: bytes | None) -> Any:
        """The answer of one attempt."""
        try:
            status, retry_after, content = self._attempt(method, path, data)
        except (OSError, HTTPException) as error:
            raise _TemporaryError(self.shown(f"{type(error).__name__}: {error}")) from error
        if status == 200:
            try:
                return json.loads(content)
            except ValueError as error:
                begin = self.shown(content[:SHOWN_OF].decode(errors="replace"))
                raise ValueError(
                    f"url: {self.url}{path} does not answer with JSON, but with {begin!r}. Check the address."
                ) from error
        reason = self.shown(_reason(content))
        if status in {408, 429} or status >= 500:
            asked = retry_after if retry_after.isdecimal() else "0"  # it can also be a date
            raise _TemporaryError(f"status {status}: {reason}", float(asked))
        raise RefusedError(status, reason)

    def _attempt(self, method: str, path: str, data: bytes | None) -> tuple[int, str, bytes]:
        """Status, Retry-After and content of an answer."""
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(self._address.netloc, timeout=min(self._timeout, CONNECT_SECONDS))
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout)
            self._connections.add(connection)
            # it may refuse a request before it has read all of it
            with suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._address.path + path, data, headers)
            response = connection.getresponse()
            return response.status, response.getheader("Retry-After") or "", response.read()
        finally:
            self._connections.discard(connection)
            connection.close()

    def _warn(self, cause: Exception) -> None:
        if self._unwarned.acquire(blocking=False):  # never released: one warning is enough
            rank_zero_warn(f"{self.url} does not answer ({cause}). Trying up to {self._retries} times more.")


def _address(url: str, key_variable: str) -> SplitResult:
    """The parts of an address, without ``/v1``."""
    try:
        address = urlsplit(url.rstrip("/").removesuffix("/v1").rstrip("/"))
        usable = address.scheme in {"http", "https"} and address.hostname and address.port != 0
    except ValueError:  # of the port, or of brackets
        address, usable = SplitResult("", "", "", "", ""), False
    if "@" in url or "?" in url:
        raise ValueError(
            f"url: contains credentials or a query. Put the key in the environment variable {key_variable}."
        )
    if not usable:
        raise ValueError(f"url: expected http://host:port or https://host, got {url!r}.")
    return address


def _reason(content: bytes) -> str:
    """The explanation in an error's content: the message, if it is in the form that these servers use."""
    text = content.decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        error = json.loads(text)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) else error)
    return text
