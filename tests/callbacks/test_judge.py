"""The judge's figures, and what asking may never do: cost more than allowed, ask twice, stop a training, or show the key."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from command_line import run, tiny_config, write
from lightning.pytorch.loggers import CSVLogger
from processes import run_on_ranks

from lit_distill.callbacks import Judge
from lit_distill.data import ProceduralData
from lit_distill.evaluation.budget import Budget, CostTracker
from lit_distill.evaluation.chat import ChatClient, ChatEndpoint, EndpointError, RequestRefusedError
from lit_distill.evaluation.judge import Question, parse_scores
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import NextToken
from lit_distill.types import ArgumentError, Batch

DATA = {"num_train": 32, "num_validation": 4, "num_test": 5, "batch_size": 8, "eval_batch_size": 4}
SECRET = "sk-very-secret-0123456789"  # noqa: S105 - of nobody
MAX_NEW_TOKENS, NUM_TEST = 4, 5


def score(text: str) -> int:
    return 1 + len(text) % 10


def chat(content: str | None, prompt_tokens: int = 100, completion_tokens: int = 10) -> dict:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": usage
    }  # fmt: skip


def by_length(body: dict) -> tuple:
    """A judge whose scores are functions of the two texts."""
    return 200, {}, chat(" ".join(str(score(text)) for text in shown(body)) + "\nBecause.")


def shown(body: dict) -> list[str]:
    content = body["messages"][-1]["content"]
    return [re.search(rf"<answer_{i}>\n(.*?)\n</answer_{i}>", content, re.DOTALL)[1] for i in (1, 2)]


def test_a_prompt_without_a_reference_is_no_question(monkeypatch) -> None:
    monkeypatch.setattr("lit_distill.callbacks.judge.generate_for_prompts", lambda *_: None)
    module = SimpleNamespace(response_texts=lambda _: ["one", "two"])
    judge = Judge(ChatEndpoint("http://127.0.0.1:1/v1", "stub"), max_new_tokens=4, seeds=[0])
    judge.on_batch(None, module, Batch(("a", "b"), references=((), ("x",)), prompt_texts=("A", "B")))
    assert judge._questions == [Question("b", 0, "B", "two", "x")]


def client(endpoint: ChatEndpoint, **budget: float) -> tuple[ChatClient, CostTracker]:
    account = CostTracker(Budget(**budget))
    return ChatClient(endpoint, account), account


class Stub:
    """An endpoint on this machine; ``reply`` makes status, headers and payload of a request's body."""

    def __init__(self) -> None:
        self.reply = by_length
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.headers: set[str] = set()
        self.times: list[float] = []
        stub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.bodies.append(body)
                    stub.keys.append(self.headers["Authorization"])
                    stub.headers |= {name.lower() for name in self.headers}
                    stub.times.append(time.monotonic())
                    status, headers, payload = stub.reply(body)
                assert self.path == "/v1/chat/completions"
                data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
                headers = {"Content-Type": "application/json", **headers}
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:  # where a client that follows redirects would arrive
                stub.bodies.append({})
                self.send_error(404)

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that has given up waiting
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def judge(pair, tmp_path, stub):
    """Fit or test with a judge; gives the Trainer and the judge."""

    def trained(stage: str = "test", endpoint=None, budget=None, val_check_interval: int = 2, **options):
        endpoint = {"base_url": stub.url, "model": "stub", "max_retries": 1, **(endpoint or {})}
        options = {"max_prompts": -1, "max_new_tokens": MAX_NEW_TOKENS, **options}
        callback = Judge(ChatEndpoint(**endpoint), Budget(**(budget or {})), **options)
        trainer = L.Trainer(
            default_root_dir=tmp_path / "runs",
            accelerator="cpu",
            max_steps=4,
            val_check_interval=val_check_interval,
            log_every_n_steps=1,
            logger=CSVLogger(tmp_path / "runs"),
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        learner = DistillationModule(ModelSpec(str(pair[0])), {"ce": NextToken()})
        getattr(trainer, stage)(learner, ProceduralData(**DATA))
        return trainer, callback

    return trained


def figures_of(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "judge" in name}


def answers(trainer, batch) -> list[str]:
    """Greedy responses by transformers itself, one prompt at a time."""
    learner = trainer.lightning_module
    model, tokenizer = learner.student.model.eval(), learner.tokenizer
    texts = []
    for prompt in batch.prompt_texts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id)
        texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.slow
def test_the_ratio_is_that_of_the_sums_and_the_reference_stands_first(judge, stub) -> None:
    trainer, callback = judge()
    pairs = []
    for batch in trainer.datamodule.test_dataloader():
        pairs += zip((accepted[0] for accepted in batch.references), answers(trainer, batch), strict=True)
    assert sorted(map(tuple, map(shown, stub.bodies))) == sorted(pairs)
    references, students = (sum(map(score, column)) for column in zip(*pairs, strict=True))
    assert figures_of(trainer) == pytest.approx(
        {
            "test/judge_ratio": 100 * students / references,
            "test/judge_student": students / NUM_TEST,
            "test/judge_reference": references / NUM_TEST,
            "test/judge_count": NUM_TEST,
        }
    )
    report = callback.report()["judge"]
    assert report["ratio"] == pytest.approx(100 * students / references)
    assert (report["requests"], report["input_tokens"], report["output_tokens"]) == (5, 500, 50)
    assert {sample["student_score"] for sample in report["samples"]} == {score(student) for _, student in pairs}
    json.dumps(report, allow_nan=False)


@pytest.mark.slow
def test_swapped_orders_undo_a_preference_for_the_first_place(judge, stub, tmp_path) -> None:
    stub.reply = lambda body: (200, {}, chat("9 5"))
    assert judge()[1].report()["judge"]["ratio"] == pytest.approx(100 * 5 / 9)
    _, callback = judge(swap=True, cache=str(tmp_path / "other.jsonl"))
    assert callback.report()["judge"]["ratio"] == pytest.approx(100)
    assert sorted(map(tuple, map(shown, stub.bodies[NUM_TEST:]))) == sorted(
        pair for body in stub.bodies[:NUM_TEST] for pair in (tuple(shown(body)), tuple(shown(body)[::-1]))
    )


@pytest.mark.slow
def test_the_ratio_is_the_mean_over_seeds(judge, stub) -> None:
    _, callback = judge(seeds=[1, 2, 3], temperature=1.0)
    report = callback.report()["judge"]
    assert report["count"] == 3 * NUM_TEST
    assert len(report["ratios"]) == 3
    assert report["ratio"] == pytest.approx(sum(report["ratios"]) / 3)
    mean = sum(report["ratios"]) / 3
    assert report["ratio_std"] == pytest.approx((sum((r - mean) ** 2 for r in report["ratios"]) / 2) ** 0.5)


@pytest.mark.slow
def test_a_second_run_asks_nothing_even_after_a_line_was_cut_in_two(judge, stub, tmp_path) -> None:
    first = judge()[1].report()["judge"]
    cache = tmp_path / "runs" / "judge.jsonl"
    assert len(cache.read_text().splitlines()) == len(stub.bodies) == NUM_TEST
    second = judge()[1].report()["judge"]
    assert len(stub.bodies) == NUM_TEST
    assert (second["ratio"], second["requests"], second["cached"]) == (first["ratio"], 0, NUM_TEST)
    cache.write_bytes(cache.read_bytes()[:-9])
    assert judge()[1].report()["judge"]["ratio"] == first["ratio"]
    assert len(stub.bodies) == NUM_TEST + 1  # the broken one only
    judge()
    assert len(stub.bodies) == NUM_TEST + 1
    judge(endpoint={"model": "another"})
    assert len(stub.bodies) == 2 * NUM_TEST + 1


@pytest.mark.slow
def test_answers_without_scores_are_counted_and_left_out(judge, stub) -> None:
    replies = iter(["Both are fine.", "8 0", "11 3", "<think>7 7</think>\n**8/10, 4/10**\nSo.", "6 3"])
    stub.reply = lambda body: (200, {}, chat(next(replies)))
    with pytest.warns(UserWarning, match="3 answers have no scores"):
        _, callback = judge(num_workers=1)
    report = callback.report()["judge"]
    assert (report["count"], report["unparsable"]) == (2, 3)
    assert report["ratio"] == pytest.approx(100 * (4 + 3) / (8 + 6))


@pytest.mark.parametrize(
    ("answer", "scores"),
    [("8 6.5\nBecause", (8, 6.5)), ("\n\n`7, 9`", (7, 9)), ("10/10 1/10", (10, 1)), ("8 6 7", None), ("8", None),
     ("", None), ("Answer 1: 8, answer 2: 6", None), ("-8 6", (8, 6)), ("80 60", None)],
)  # fmt: skip
def test_scores_are_read_from_a_first_line_that_holds_nothing_else(answer, scores) -> None:
    assert parse_scores(answer) == scores


@pytest.mark.slow
def test_the_request_budget_is_kept_said_once_and_the_rest_is_asked_later(judge, stub) -> None:
    with pytest.warns(UserWarning, match="the budget is reached; 2 of 5") as warned:
        _, callback = judge(budget={"max_requests": 3})
    assert len([w for w in warned if "budget" in str(w.message)]) == 1
    assert len(stub.bodies) == 3
    assert (callback.report()["judge"]["count"], callback.report()["judge"]["not_asked"]) == (3, 2)
    judge(budget={"max_requests": 3})
    assert len(stub.bodies) == NUM_TEST


PRICES = {"price_per_million_input_tokens": 2.0, "price_per_million_output_tokens": 8.0}
QUESTION = Question("a", 0, "p", "student", "ref").messages()


@pytest.mark.parametrize("max_retries", [0, 3])
def test_the_cost_stays_below_the_budget_with_many_workers(stub, max_retries) -> None:
    endpoint = ChatEndpoint(stub.url, "stub", parameters={"max_tokens": 50}, max_retries=max_retries)
    body = endpoint.body(QUESTION)
    stub.reply = lambda _: (200, {}, chat("7 7", prompt_tokens=300, completion_tokens=50))
    each = (2.0 * 300 + 8.0 * 50) / 1e6
    chat_client, account = client(endpoint, max_cost=30 * each, **PRICES)
    results = []

    def worker() -> None:
        results.extend(chat_client.ask(body) for _ in range(20))

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = sum(answer is not None for answer in results)
    bound = (2.0 * (len(json.dumps(body)) + 128) + 8.0 * 50) / 1e6  # of one attempt, before its usage is known
    assert answered == len(stub.bodies)
    assert account.cost == pytest.approx(answered * each)
    assert 30 * each - (max_retries + 1) * bound < account.cost <= 30 * each


def test_attempts_without_a_response_may_have_cost_and_stay_below_the_budget_too(stub) -> None:
    silent, seen = threading.Event(), []

    def reply(body: dict) -> tuple:
        seen.append(body)
        if len(seen) == 1:
            silent.wait(5)
        return (503, {"retry-after-ms": "1"}, b"busy") if len(seen) == 2 else (200, {}, chat("7 7"))

    stub.reply = reply
    endpoint = ChatEndpoint(stub.url, "stub", timeout_seconds=0.3, max_retries=2, parameters={"max_tokens": 5})
    bound = (2.0 * (len(json.dumps(endpoint.body(QUESTION))) + 128) + 8.0 * 5) / 1e6
    chat_client, account = client(endpoint, max_cost=3 * bound, **PRICES)
    threading.Timer(0.4, silent.set).start()  # the stub answers one request at a time
    assert chat_client.ask(endpoint.body(QUESTION)) == "7 7"
    assert account.requests == 1
    assert account.cost == pytest.approx(bound + (2.0 * 100 + 8.0 * 10) / 1e6)
    assert chat_client.ask(endpoint.body(QUESTION)) is None
    assert len(seen) == 3


@pytest.mark.parametrize("status", [408, 409, 429, 503])
def test_a_busy_endpoint_is_asked_again_after_as_long_as_it_says(stub, status) -> None:
    waits = iter([{"Retry-After": "0.4"}, {"retry-after-ms": "1"}])
    stub.reply = lambda body: (status, h, b"busy") if (h := next(waits, None)) is not None else by_length(body)
    endpoint = ChatEndpoint(stub.url, "stub")
    chat_client, account = client(endpoint)
    assert chat_client.ask(endpoint.body(QUESTION)).startswith(f"{score('ref')} {score('student')}")
    first, second, third = stub.times
    assert second - first >= 0.4
    assert third - second < 0.4
    assert account.requests == 1
    assert stub.bodies == [endpoint.body(QUESTION)] * 3


def test_attempts_end_and_say_what_the_endpoint_said(stub) -> None:
    stub.reply = lambda body: (503, {"retry-after-ms": "1"}, b"overloaded, your key is " + SECRET.encode())
    endpoint = ChatEndpoint(stub.url, "stub", max_retries=2)
    with pytest.raises(EndpointError, match=r"base_url: .*503: overloaded, your key is \*\*\*\. Gave up"):
        client(endpoint)[0].ask(endpoint.body(QUESTION))
    assert len(stub.bodies) == 3


def test_nobody_waits_for_a_day(stub) -> None:
    stub.reply = lambda body: (429, {"Retry-After": "86400"}, b"tomorrow")
    endpoint = ChatEndpoint(stub.url, "stub", max_retries=1)
    start = time.monotonic()
    with pytest.raises(EndpointError, match="429: tomorrow"):
        client(endpoint)[0].ask(endpoint.body(QUESTION))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, EndpointError, "api_key_env: .*OPENAI_API_KEY"), (403, EndpointError, "api_key_env: .*OPENAI_API_KEY"),
     (404, EndpointError, "base_url: .* model"), (302, EndpointError, "base_url: "), (307, EndpointError, "base_url: "),
     (400, RequestRefusedError, "400: too long"), (422, RequestRefusedError, "422: too long")],
)  # fmt: skip
def test_what_cannot_succeed_is_not_asked_again(stub, status, error, message) -> None:
    stub.reply = lambda body: (status, {"Location": f"{stub.url}/chat/completions"}, b"too long")
    endpoint = ChatEndpoint(stub.url, "stub")
    with pytest.raises(error, match=message):
        client(endpoint)[0].ask(endpoint.body(QUESTION))
    assert len(stub.bodies) == 1  # nor is the key carried to where a redirect points


def test_a_silent_endpoint_is_unreachable_and_its_silence_may_have_cost(stub) -> None:
    release = threading.Event()
    stub.reply = lambda body: (release.wait(5), by_length(body))[1]
    endpoint = ChatEndpoint(stub.url, "stub", timeout_seconds=0.1, max_retries=0, parameters={"max_tokens": 5})
    chat_client, account = client(endpoint, price_per_million_output_tokens=1e6)
    with pytest.raises(EndpointError, match=r"base_url: .*did not respond.*timed out"):
        chat_client.ask(endpoint.body(QUESTION))
    release.set()
    assert account.cost == pytest.approx(5.0)


def test_an_endpoint_that_wants_a_key_says_so(stub) -> None:
    stub.reply = lambda body: (401, {}, b"who?")
    endpoint = ChatEndpoint(stub.url, "stub", api_key_env=None)
    with pytest.raises(EndpointError, match=r"api_key_env: null, but a key is needed\. .*401: who\?"):
        client(endpoint)[0].ask(endpoint.body(QUESTION))


def test_an_endpoint_that_is_not_there_is_named_with_the_reason() -> None:
    endpoint = ChatEndpoint("http://127.0.0.1:9/v1", "stub", api_key_env=None, max_retries=0)
    with pytest.raises(EndpointError, match=r"base_url: http://127.0.0.1:9/v1 did not respond.*refused"):
        client(endpoint)[0].ask(endpoint.body(QUESTION))


def test_no_attempt_is_made_after_a_stop(stub) -> None:
    endpoint = ChatEndpoint(stub.url, "stub")
    chat_client, account = client(endpoint)

    def reply(body: dict) -> tuple:
        chat_client.stop()
        return 503, {"retry-after-ms": "1"}, b"busy"

    stub.reply = reply
    assert chat_client.ask(endpoint.body(QUESTION)) is None
    assert chat_client.ask(endpoint.body(QUESTION)) is None
    assert (len(stub.bodies), account.requests) == (1, 1)


def test_neither_the_environment_nor_the_machine_is_told_to_the_endpoint(stub, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/other")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer other\nX-More: 1")
    endpoint = ChatEndpoint(stub.url, "stub", parameters={"top_k": 1, "chat_template_kwargs": {"thinking": False}})
    assert client(endpoint)[0].ask(endpoint.body(QUESTION))
    assert client(dataclasses.replace(endpoint, api_key_env=None))[0].ask(endpoint.body(QUESTION))
    assert stub.keys == [f"Bearer {SECRET}", None]
    assert stub.headers == {
        "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host", "user-agent"
    }  # fmt: skip
    assert stub.bodies == [endpoint.body(QUESTION)] * 2


def test_a_missing_openai_is_said_with_what_to_install(stub, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(EndpointError, match=r"needs openai.*pip install 'lit-distill\[judge\]'"):
        client(ChatEndpoint(stub.url, "stub"))


def test_the_old_option_of_the_back_off_is_named_and_has_no_effect() -> None:
    with pytest.warns(FutureWarning, match=r"backoff_seconds: the client's own back-off is used; remove it\."):
        endpoint = ChatEndpoint("http://h/v1", "m", backoff_seconds=2.0)
    assert endpoint == ChatEndpoint("http://h/v1", "m")


@pytest.mark.slow
def test_a_refused_request_leaves_the_others(judge, stub) -> None:
    def reply(body: dict) -> tuple:
        return (400, {}, b"filtered") if len(stub.bodies) == 2 else by_length(body)

    stub.reply = reply
    with pytest.warns(UserWarning, match=r"1 requests were refused.*400: filtered"):
        report = judge(num_workers=1)[1].report()["judge"]
    assert (report["count"], report["refused"]) == (NUM_TEST - 1, 1)


@pytest.mark.slow
def test_a_judge_that_is_down_costs_a_training_a_warning(judge, stub) -> None:
    stub.reply = lambda body: (500, {"retry-after-ms": "1"}, b"down")
    with pytest.warns(UserWarning, match="no judge metrics.*500: down"):
        trainer, _ = judge("fit", every_n_validations=2)
    assert trainer.global_step == 4
    assert not figures_of(trainer)
    assert "val/loss" in trainer.callback_metrics


@pytest.mark.slow
def test_a_training_is_judged_at_every_nth_validation_and_by_default_at_none(judge, stub) -> None:
    trainer, _ = judge("fit", every_n_validations=2, val_check_interval=1)
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        steps = [float(row["step"]) for row in csv.DictReader(file) if row.get("val/judge_ratio")]
    assert steps == [1, 3]
    asked = len(stub.bodies)
    judge("fit")
    assert len(stub.bodies) == asked


@pytest.mark.slow
def test_a_test_whose_judge_is_down_ends_with_an_error_after_the_other_figures(judge, stub, tmp_path) -> None:
    stub.reply = lambda body: (500, {"retry-after-ms": "1"}, b"down")
    with pytest.raises(ArgumentError, match=r"^base_url: .*500: down") as caught:
        judge(num_workers=1)
    assert isinstance(caught.value.owner, ChatEndpoint)
    assert len(stub.bodies) == 2  # attempts of the first question; the others are spared
    (log,) = (tmp_path / "runs").rglob("metrics.csv")
    assert "test/perplexity" in log.read_text()
    assert "judge" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("content_type", ["text/html", "application/json"])
def test_a_test_of_whose_answers_none_can_be_used_ends_with_an_error(judge, stub, content_type) -> None:
    stub.reply = lambda body: (200, {"Content-Type": content_type}, b"<html>A web page</html>")
    with pytest.raises(ArgumentError, match=r"^model: no usable answer from stub"):
        judge()


@pytest.mark.parametrize("payload", [[], {}, {"choices": None}, {"choices": ["a"]}, {"error": "x"}, chat(None), "7 7"])
def test_a_response_of_another_format_is_an_empty_answer(stub, payload) -> None:
    stub.reply = lambda body: (200, {}, payload)
    endpoint = ChatEndpoint(stub.url, "stub")
    assert client(endpoint)[0].ask(endpoint.body(QUESTION)) == ""


@pytest.mark.slow
def test_a_cache_that_cannot_be_opened_is_an_error_of_the_judge(judge, tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"^cache: .*file") as caught:
        judge(cache=str(tmp_path / "file" / "judge.jsonl"))
    assert isinstance(caught.value.owner, Judge)


@pytest.mark.slow
def test_a_missing_key_is_said_before_the_run_with_the_variable_to_set(judge, stub, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ArgumentError, match=r"^api_key_env: .*OPENAI_API_KEY is not set") as caught:
        judge()
    assert isinstance(caught.value.owner, ChatEndpoint)
    judge("fit")  # which does not judge
    assert not stub.bodies
    judge(endpoint={"api_key_env": None})
    assert stub.keys == [None] * NUM_TEST


@pytest.mark.slow
def test_the_key_is_sent_and_written_nowhere(judge, pair, stub, tmp_path, capfd, caplog, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", SECRET + "\n")
    options = {"endpoint": {"base_url": stub.url, "model": "stub", "api_key_env": "MY_KEY"}, "every_n_validations": 1}
    options |= {"budget": {"max_requests": 99}, "seeds": [1, 2], "temperature": 1.0}
    config = tiny_config(pair)
    config["data"]["init_args"] |= DATA
    config |= {"exposure_bias": {"max_prompts": 0}}
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "runs"),
        "callbacks": [{"class_path": "Judge", "init_args": options}],
    }
    for stage in ("fit", "test"):
        run(stage, "--config", write(config, tmp_path / "x.yaml"))
    assert set(stub.keys) == {f"Bearer {SECRET}"}
    stub.reply = lambda body: (401, {}, f"wrong key {SECRET}".encode())
    with pytest.raises(ValueError, match="MY_KEY is not accepted") as caught:
        judge(endpoint={"api_key_env": "MY_KEY", "model": "other"})
    monkeypatch.setenv("MY_KEY", SECRET[:9] + "\n" + SECRET[9:])
    with pytest.raises(ValueError, match="not a valid key") as unusable:
        judge(endpoint={"api_key_env": "MY_KEY"})
    output = capfd.readouterr()
    texts = [str(caught.value), repr(caught.value), str(unusable.value), output.out, output.err, caplog.text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.csv", "judge.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".ckpt" for path in files)
    assert not [text for text in texts if SECRET in text or SECRET[9:] in text]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChatEndpoint("ftp://host", "m"), r"base_url.*ftp"),
        (lambda: ChatEndpoint("https://user:word@host/v1", "m"), r"base_url: contains credentials"),
        (lambda: ChatEndpoint("http://h/v1", "m", timeout_seconds=0), r"timeout_seconds.*got 0"),
        (lambda: ChatEndpoint("http://h/v1", "m", max_retries=-1), r"max_retries.*got -1"),
        (lambda: ChatEndpoint("http://h/v1", "m", parameters={"stream": True}), r"parameters: 'stream'"),
        (lambda: Budget(max_requests=-1), r"max_requests: "),
        (lambda: Budget(price_per_million_output_tokens=-1.0), r"price_per_million_input_tokens, .*-1"),
        (lambda: Budget(max_cost=1.0), r"max_cost: .*price_per_million_input_tokens"),
        (lambda: Judge(ChatEndpoint("http://h/v1", "m"), num_workers=0), r"num_workers: "),
        (
            lambda: Judge(ChatEndpoint("http://h/v1", "m", parameters={}), Budget(max_cost=1.0, **PRICES)),
            r"budget.max_cost: .*endpoint\.parameters\.max_tokens",
        ),
        (lambda: client(ChatEndpoint("http://1.2.3.999/v1", "m", api_key_env=None)), r"base_url: .*1\.2\.3\.999"),
    ],
)
def test_errors_begin_with_the_argument(make, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        make()
    assert "word" not in str(caught.value)


SCRIPT = """
import json, sys
import lightning as L
from lit_distill.callbacks import Judge
from lit_distill.data import ProceduralData
from lit_distill.evaluation.chat import ChatEndpoint
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import NextToken

student, url, out, data = sys.argv[1:]
judge = Judge(ChatEndpoint(url, "stub"), max_prompts=-1, max_new_tokens=4, cache=out)
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[judge],
)
learner = DistillationModule(ModelSpec(student), {"ce": NextToken()})
trainer.test(learner, ProceduralData(**json.loads(data)))
metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if "judge" in k}
with open(f"{out}.rank-{trainer.global_rank}", "w") as file:
    json.dump([metrics, judge.report()["judge"]], file)
"""


@pytest.mark.slow
def test_two_ranks_ask_what_one_asks_and_have_its_figures(judge, stub, pair, tmp_path) -> None:
    trainer, callback = judge()
    asked = sorted(map(json.dumps, stub.bodies))
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    cache = tmp_path / "two.jsonl"
    run_on_ranks(script, 2, pair[0], stub.url, cache, json.dumps(DATA))
    for rank in range(2):
        metrics, report = json.loads(Path(f"{cache}.rank-{rank}").read_text())
        assert metrics == pytest.approx(figures_of(trainer))
        assert report == callback.report()["judge"]
    assert sorted(map(json.dumps, stub.bodies[NUM_TEST:])) == asked
