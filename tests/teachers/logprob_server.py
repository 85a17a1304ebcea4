"""A server on this machine that scores texts as vLLM and SGLang do, from the logits of a function, with faults to switch on."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from torch import Tensor

MAX_LOGPROBS = 20  # vLLM's default


@dataclass
class Faults:
    """What goes wrong, until it is set back."""

    delay: float = 0.0  # seconds before each answer
    slow: int = 0  # number of further requests that take `slow_seconds` longer
    slow_seconds: float = 0.3
    down: int = 0  # number of further requests that are answered with status 503
    down_status: int = 503
    retry_after: str | None = None
    lost: int = 0  # number of further requests whose connection is closed without an answer
    shifted: bool = False  # log-probabilities of each token are those of the next
    other_ids: dict[int, int] | None = None  # another tokenizer: these ids are scored in place of those that were sent
    silent_ids: bool = False  # vLLM before return_token_ids
    fewer: int = 0  # entries that are missing in each row
    not_finite: bool = False
    logits: bool = False  # --logprobs-mode raw_logits
    content: bytes | None = None  # instead of JSON
    status: int = 200  # with `content`
    texts_missing: int = 0


class LogprobServer:
    """``logits_of(ids)`` gives ``[T, V]``, whose row t predicts token t + 1. As a context manager it runs and stops."""

    def __init__(
        self,
        logits_of: Callable[[list[int]], Tensor],
        *,
        models: tuple[str, ...] = ("teacher",),
        max_model_len: int | None = 64,
        key: str | None = None,
    ) -> None:
        self.logits_of, self.models, self.max_model_len, self.key = logits_of, models, max_model_len, key
        self.faults = Faults()
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self, None)

            def do_POST(self) -> None:
                server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @property
    def num_requests(self) -> int:
        return len(self.paths)

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        faults = self.faults
        with self._lock:
            self.paths.append(handler.path)
            self.headers.append(dict(handler.headers))
            if body is not None:
                self.bodies.append(body)
            slow, down, lost = faults.slow > 0, faults.down > 0, faults.lost > 0
            faults.slow, faults.down, faults.lost = faults.slow - slow, faults.down - down, faults.lost - lost
        time.sleep(faults.delay + slow * faults.slow_seconds)
        if lost:
            return  # without an answer, the handler closes the connection
        headers = {}
        if down:
            status, content = faults.down_status, {"error": {"message": "the engine is not ready"}}
            headers = {} if faults.retry_after is None else {"Retry-After": faults.retry_after}
        elif self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            status, content = 401, {"error": f"Unauthorized: {handler.headers['Authorization']}"}
        elif faults.content is not None:
            status, content = faults.status, faults.content
        else:
            status, content = self._content(handler.path, body)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # the client no longer waits
            pass

    def _content(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        if path == "/v1/models":
            cards = [{"id": name, "object": "model", "max_model_len": self.max_model_len} for name in self.models]
            return 200, {"object": "list", "data": cards}
        if path == "/v1/completions" and body is not None:
            return self._vllm(body)
        if path == "/generate" and body is not None:
            return self._sglang(body)
        return 404, {"detail": "Not Found"}

    def _vllm(self, body: dict[str, Any]) -> tuple[int, Any]:
        k, longest = body["prompt_logprobs"], max(map(len, body["prompt"]))
        if body["model"] not in self.models:
            return _vllm_error(404, f"The model `{body['model']}` does not exist.")
        if k > MAX_LOGPROBS:
            return _vllm_error(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {MAX_LOGPROBS}"
            )
        if self.max_model_len is not None and longest + body["max_tokens"] > self.max_model_len:
            return _vllm_error(
                400,
                f"You passed {longest} input tokens and requested {body['max_tokens']} output tokens. However, the model's "
                f"context length is only {self.max_model_len} tokens, resulting in a maximum input length of "
                f"{self.max_model_len - body['max_tokens']} tokens. Please reduce the length of the input prompt.",
            )
        choices = []
        for index, sent in enumerate(body["prompt"][self.faults.texts_missing :]):
            own, top = self._scores(sent, k)
            ids = self._scored_ids(sent)
            rows: list[Any] = [None]
            for token in range(1, len(ids)):
                # as in vLLM: the text's own token first, which its place among the k then overwrites
                entries = [own[token], *top[token][: k - self.faults.fewer]]
                rank = 1 + sum(value > own[token][0] for value, _ in top[token])
                ranks = [rank, *range(1, k + 1)]
                row = {str(i): {"logprob": v, "rank": r, "decoded_token": "x"} for (v, i), r in zip(entries, ranks)}  # noqa: B905
                if self.faults.fewer:
                    row = dict(list(row.items())[: k - self.faults.fewer])
                rows.append(row)
            choice = {
                "index": index,
                "text": " x",
                "logprobs": None,
                "finish_reason": "length",
                "prompt_logprobs": rows,
            }
            with_ids = body.get("return_token_ids") and not self.faults.silent_ids
            choices.append({**choice, "prompt_token_ids": ids if with_ids else None})
        return 200, {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}  # in any order

    def _sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        k, longest = body["top_logprobs_num"], max(map(len, body["input_ids"]))
        assert body["return_logprob"]
        assert body["logprob_start_len"] == 0
        assert body["sampling_params"]["max_new_tokens"] == 0
        if self.max_model_len is not None and longest >= self.max_model_len:
            message = (
                f"The input ({longest} tokens) is longer than the model's context length ({self.max_model_len} tokens)."
            )
            return 400, {"error": {"message": message}}
        answers = []
        for sent in body["input_ids"][self.faults.texts_missing :]:
            own, top = self._scores(sent, k)
            ids = self._scored_ids(sent)
            last = self.logits_of(ids).shape[-1] - 1
            entries: list[Any] = [[None, ids[0] if ids[0] < last else 0, None]]
            rows: list[Any] = [None]
            for token in range(1, len(ids)):
                shown = ids[token] if ids[token] < last else 0  # as in SGLang, which takes it for a part of an image
                entries.append([own[token][0], shown, None])
                rows.append([[value, i, None] for value, i in top[token][: k - self.faults.fewer]])
            answers.append({"text": "", "meta_info": {"input_token_logprobs": entries, "input_top_logprobs": rows}})
        return 200, answers

    def _scored_ids(self, sent: list[int]) -> list[int]:
        other = self.faults.other_ids or {}
        return [other.get(token, token) for token in sent]

    def _scores(self, sent: list[int], k: int) -> tuple[list[Any], list[Any]]:
        """For each token but the first: its own (log-probability, id), and those of the k first."""
        faults, ids = self.faults, self._scored_ids(sent)
        logits = self.logits_of(ids)
        scores = logits + 50 if faults.logits else logits.log_softmax(-1)
        own: list[Any] = [None]
        top: list[Any] = [None]
        for token in range(1, len(ids)):
            label = ids[min(token + 1, len(ids) - 1)] if faults.shifted else ids[token]
            row = scores[min(token, len(ids) - 2) if faults.shifted else token - 1]
            best = row.topk(k)
            value = row[label].item()
            if faults.not_finite and token == 1:
                value = math.nan
            own.append((value, label))
            top.append(list(zip(best.values.tolist(), best.indices.tolist(), strict=True)))
        if faults.not_finite:
            top[1][0] = (math.nan, top[1][0][1])
        return own, top


def _vllm_error(code: int, message: str) -> tuple[int, Any]:
    return code, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}
