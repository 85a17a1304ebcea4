"""A teacher on a server: its numbers are the model's own, and whatever goes wrong is refused, with what to do about it."""

from __future__ import annotations

import json
import re
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import torch
from logprob_server import MAX_LOGPROBS, LogprobServer
from torch import Tensor

from lit_distill.teachers.completions import CompletionsClient

VOCABULARY, TOP_K, KEY_VARIABLE = 40, 8, "LIT_DISTILL_TEACHER_KEY"
SECRET = "sk-very-secret-0123456789"  # noqa: S105 - of nobody
TEXTS = [[3, 17, 5, 5, 39, 8], [1, 39], [7, 0, 2, 30, 31, 12, 6], [9, 9, 4]]
NAMES = ["item-a", "item-b", "item-c", "item-d"]
both_protocols = pytest.mark.parametrize("api", ["vllm", "sglang"])


def logits_of(ids: list[int]) -> Tensor:
    """A model of the last two tokens, other for each."""
    rows = []
    for before, last in zip([0, *ids], ids, strict=False):
        rows.append(
            3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1 + before * VOCABULARY + last))
        )
    return torch.stack(rows)


@pytest.fixture
def server(monkeypatch) -> Iterator[LogprobServer]:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with LogprobServer(logits_of) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator:
    made = []

    def make(**changes) -> CompletionsClient:
        options = {"top_k": TOP_K, "timeout": 5.0, "retries": 2, "backoff_seconds": 0.01, "url": server.url}
        made.append(CompletionsClient(**{**options, **changes}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def message_of(kind: type[Exception], client: CompletionsClient, texts=TEXTS, names=NAMES) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of attempts that are repeated
        with pytest.raises(kind) as caught:
            client.score(texts, names)
    return str(caught.value)


@both_protocols
def test_the_rows_are_the_most_probable_tokens_of_the_model(client, api) -> None:
    for text, scored in zip(TEXTS, client(api=api).score(TEXTS, NAMES), strict=True):
        expected = logits_of(text)[:-1].log_softmax(-1).topk(TOP_K)
        torch.testing.assert_close(scored.ids[1:], expected.indices)
        torch.testing.assert_close(scored.logprobs[1:], expected.values, atol=1e-5, rtol=0)


@both_protocols
def test_the_labels_have_their_own_log_probabilities(client, api) -> None:
    for text, scored in zip(TEXTS, client(api=api).score(TEXTS, NAMES), strict=True):
        labels = torch.tensor(text[1:])
        expected = logits_of(text)[:-1].log_softmax(-1).gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(scored.label_logprobs[1:], expected, atol=1e-5, rtol=0)


@both_protocols
def test_some_labels_are_not_among_the_k(client, api) -> None:
    scored = client(api=api).score(TEXTS, NAMES)[2]
    assert not (scored.ids == torch.tensor(TEXTS[2])[:, None])[1:].any(1).all()


@both_protocols
def test_token_0_has_zeros(client, api) -> None:
    for scored in client(api=api).score(TEXTS, NAMES):
        assert not scored.ids[0].any()
        assert not scored.logprobs[0].any()
        assert scored.label_logprobs[0] == 0


@both_protocols
def test_the_last_id_of_the_vocabulary_may_be_sent(client, api) -> None:
    """SGLang returns 0 in its place."""
    last = VOCABULARY - 1
    scored = client(api=api).score([[last, 3, last]], ["item"])[0]
    expected = logits_of([last, 3])[1].log_softmax(-1)[last]
    assert scored.label_logprobs[2].item() == pytest.approx(expected.item(), abs=1e-5)


@both_protocols
def test_shapes_and_types_are_as_documented(client, api) -> None:
    scored = client(api=api).score(TEXTS, NAMES)[0]
    assert (scored.ids.shape, scored.ids.dtype) == ((6, TOP_K), torch.int64)
    assert (scored.logprobs.shape, scored.logprobs.dtype) == ((6, TOP_K), torch.float32)
    assert (scored.label_logprobs.shape, scored.label_logprobs.dtype) == ((6,), torch.float32)


@both_protocols
def test_the_whole_vocabulary_may_be_asked_for(client, api, monkeypatch) -> None:
    monkeypatch.setattr("logprob_server.MAX_LOGPROBS", VOCABULARY)
    for scored in client(api=api, top_k=VOCABULARY).score(TEXTS, NAMES):
        assert scored.logprobs[1:].exp().sum(1) == pytest.approx(torch.ones(len(scored.ids) - 1), abs=1e-5)


def test_texts_of_one_token_are_not_sent(client, server) -> None:
    empty, single, text = client().score([[], [5], [5, 6]], ["a", "b", "c"])
    assert (empty.ids.shape, single.ids.shape, text.ids.shape) == ((0, TOP_K), (1, TOP_K), (2, TOP_K))
    assert [body["prompt"] for body in server.bodies] == [[[5, 6]]]


def test_no_texts_need_no_server(client) -> None:
    assert client(url="http://127.0.0.1:1").score([], []) == []


@both_protocols
def test_results_are_in_the_order_of_the_texts(client, server, api) -> None:
    texts = [[1, i % VOCABULARY, 2] for i in range(11)]
    server.faults.slow = 1  # the first request ends last
    scored = client(api=api, texts_per_request=2, num_workers=4).score(texts, [str(i) for i in range(11)])
    expected = [logits_of(text)[0].log_softmax(-1)[text[1]].item() for text in texts]
    assert [one.label_logprobs[1].item() for one in scored] == pytest.approx(expected, abs=1e-5)


def test_requests_run_at_the_same_time(client, server) -> None:
    together = threading.Barrier(4)

    def waiting(ids: list[int]) -> Tensor:
        together.wait(timeout=20)  # until four of them are under way
        return logits_of(ids)

    with LogprobServer(waiting) as slow:
        asking = client(url=slow.url, texts_per_request=1, num_workers=8, model="teacher", timeout=30.0)
        assert len(asking.score([[1, i] for i in range(8)], [str(i) for i in range(8)])) == 8


def test_submitting_does_not_wait(client, server) -> None:
    server.faults.delay = 0.3
    future = client().submit(TEXTS, NAMES)
    assert not future.done()
    assert len(future.result()) == len(TEXTS)


def test_a_request_holds_as_many_texts_as_it_may(client, server) -> None:
    client(texts_per_request=3).score(TEXTS, NAMES)
    assert sorted(len(body["prompt"]) for body in server.bodies) == [1, 3]


def test_sglang_is_sent_what_it_documents(client, server) -> None:
    client(api="sglang").score(TEXTS[:1], NAMES[:1])
    plain = {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    scores = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": TOP_K}
    assert server.bodies == [{"input_ids": TEXTS[:1], "sampling_params": plain, **scores}]


def test_vllm_is_sent_what_it_documents(client, server) -> None:
    client().score(TEXTS[:1], NAMES[:1])
    assert server.bodies == [
        {
            "model": "teacher", "prompt": TEXTS[:1], "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": TOP_K,
            "return_token_ids": True,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_with_v1(client, server, ending) -> None:
    client(url=server.url + ending, model="teacher").score(TEXTS[:1], NAMES[:1])
    assert server.paths == ["/v1/completions"]


def test_the_only_model_is_taken(client) -> None:
    assert client().describe() == ("teacher", 64)


def test_a_model_is_named_if_there_are_several(client, server) -> None:
    server.models = ("small", "large")
    said = message_of(ValueError, client())
    assert said == f"model: expected the name of one that {server.url} serves: small, large."


def test_a_named_model_is_described(client, server) -> None:
    server.models = ("small", "large")
    assert client(model="large").describe().name == "large"


def test_a_model_that_is_not_served_cannot_be_described(client, server) -> None:
    with pytest.raises(ValueError, match=r"model: expected the name of one .*: teacher; got 'other'\."):
        client(model="other").describe()


def test_the_longest_text_leaves_room_for_one_more_token(client) -> None:
    limit = client().limit
    assert limit == 63
    assert len(client().score([[1] * limit], ["longest"])) == 1


def test_a_server_need_not_tell_the_longest_text(client, server) -> None:
    server.max_model_len = None
    assert client().limit is None


@both_protocols
def test_a_text_that_is_too_long_is_named(client, api) -> None:
    said = message_of(ValueError, client(api=api), [[1, 2], [1] * 64], ["short", "long"])
    assert "long has 64 tokens, and the server needs max_model_len >= tokens + 1 = 65" in said
    assert "context length" in said  # the server's own words


def test_too_large_a_k_is_refused_by_vllm(client) -> None:
    said = message_of(ValueError, client(top_k=MAX_LOGPROBS + 1))
    assert said.startswith("top_k: 21 is more than the server allows.")
    assert "--max-logprobs" in said


@both_protocols
def test_too_few_entries_are_refused(client, server, api) -> None:
    server.faults.fewer = 3
    said = message_of(ValueError, client(api=api))
    assert said.startswith(f"top_k: {server.url} returned 5 instead of 8 log-probabilities for token 1 of item-a.")
    assert ("--max-logprobs" in said) == (api == "vllm")


@both_protocols
def test_another_tokenizer_is_refused(client, server, api) -> None:
    server.faults.other_ids = {5: 6}
    said = message_of(ValueError, client(api=api))
    assert "token 2 of item-a is 5, but it scored 6" in said
    assert "Serve the model whose tokenizer made these ids" in said


def test_another_tokenizer_is_refused_if_vllm_does_not_return_ids(client, server) -> None:
    server.faults.other_ids = {5: 6}
    server.faults.silent_ids = True
    assert re.search(
        r"token 2 of item-a is 5, but its entries are for \d+, .* and others\. ", message_of(ValueError, client())
    )


@both_protocols
def test_shifted_tokens_are_refused(client, server, api) -> None:
    server.faults.shifted = True
    said = message_of(ValueError, client(api=api))
    assert "item-a" in said
    assert "the server shifts tokens" in said


@both_protocols
def test_shifted_tokens_are_refused_even_if_each_is_among_the_k(client, server, api) -> None:
    """Then the ids alone do not tell."""
    row = torch.zeros(VOCABULARY)
    row[:TOP_K] = torch.arange(TOP_K, 0, -1).float()
    server.logits_of = lambda ids: row.repeat(len(ids), 1)
    server.faults.shifted = True
    said = message_of(ValueError, client(api=api), [[0, 1, VOCABULARY - 1]], ["item"])
    assert "log-probabilities of another token for token 1 of item, which is 1" in said


@both_protocols
def test_numbers_that_are_not_finite_are_refused(client, server, api) -> None:
    server.faults.not_finite = True
    said = message_of(ValueError, client(api=api), TEXTS[:1], NAMES[:1])
    assert f"{server.url} returned a log-probability that is not finite for token 1 of item-a" in said


@both_protocols
def test_null_is_not_a_number(client, server, api) -> None:
    """Servers write NaN as null."""
    server.faults.not_finite = True
    content = server._content(
        {"vllm": "/v1/completions", "sglang": "/generate"}[api],
        {
            "model": "teacher", "prompt": TEXTS[:1], "max_tokens": 1, "prompt_logprobs": TOP_K, "input_ids": TEXTS[:1],
            "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": TOP_K,
            "sampling_params": {"max_new_tokens": 0},
        },
    )[1]  # fmt: skip
    server.faults.content = json.dumps(content).replace("NaN", "null").encode()
    assert "not finite" in message_of(ValueError, client(api=api, model="teacher"), TEXTS[:1], NAMES[:1])


@both_protocols
def test_logits_are_refused(client, server, api) -> None:
    server.faults.logits = True
    said = message_of(ValueError, client(api=api))
    assert "probabilities that add up to more than 1 for token 1 of item-a" in said
    assert ("--logprobs-mode" in said) == (api == "vllm")


@both_protocols
@pytest.mark.parametrize("content", [b"<html>hello</html>", b'{"choices": [{"index": 0}]}', b"[1, 2]", b"null", b""])
def test_garbage_is_refused(client, server, api, content) -> None:
    server.faults.content = content
    said = message_of(ValueError, client(api=api, model="teacher"))
    assert re.match(rf"url: {server.url}/\S+ does not answer", said)


@both_protocols
def test_a_result_is_missing(client, server, api) -> None:
    server.faults.texts_missing = 1
    assert "returned 3 results for 4 texts" in message_of(ValueError, client(api=api))


def test_a_token_twice_is_refused(client, server) -> None:
    first = {"meta_info": {"input_token_logprobs": [[None, 1, None], [-1.0, 2, None]]}}
    first["meta_info"]["input_top_logprobs"] = [None, [[-1.0, 2, None]] * TOP_K]
    server.faults.content = json.dumps([first]).encode()
    assert "a token twice" in message_of(ValueError, client(api="sglang"), [[1, 2]], ["item"])


@both_protocols
def test_a_server_that_comes_back_is_asked_again(client, server, api) -> None:
    server.faults.down = 2
    asking = client(api=api, model="teacher")
    with pytest.warns(UserWarning, match=f"{server.url} does not answer .*503.* up to 2 times more") as caught:
        assert len(asking.score(TEXTS, NAMES)) == len(TEXTS)
    assert (server.num_requests, len(caught)) == (3, 1)


@pytest.mark.parametrize("status", [408, 429, 500, 502])
def test_these_statuses_are_temporary(client, server, status) -> None:
    server.faults.down, server.faults.down_status = 1, status
    with pytest.warns(UserWarning, match="does not answer"):
        client().score(TEXTS, NAMES)


def test_a_lost_connection_is_made_again(client, server) -> None:
    server.faults.lost = 2
    with pytest.warns(UserWarning, match="does not answer"):
        assert len(client().score(TEXTS, NAMES)) == len(TEXTS)


def test_a_server_that_takes_too_long_is_asked_again(client, server) -> None:
    server.faults.slow = 1
    with pytest.warns(UserWarning, match="timed out|Timeout"):
        assert len(client(timeout=0.15).score(TEXTS, NAMES)) == len(TEXTS)


def test_a_server_that_stays_down_ends_with_what_to_do(client, server) -> None:
    server.faults.down = 100
    said = message_of(ConnectionError, client(model="teacher"))
    assert re.match(rf"url: {server.url}/v1/completions did not answer in 3 attempts within \d+ s; ", said)
    for words in ("status 503: the engine is not ready", "Start the server", "--ckpt_path last", "timeout and retries"):
        assert words in said
    assert server.num_requests == 3


def test_no_server_ends_with_what_to_do(client) -> None:
    said = message_of(ConnectionError, client(url="http://127.0.0.1:1"))
    assert "http://127.0.0.1:1/v1/models did not answer" in said
    assert "refused" in said


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        (None, [0.5, 1.0, 2.0]),
        ("1", [1.0, 1.0, 2.0]),
        ("999", [60.0] * 3),
        ("Fri, 31 Dec 1999 23:59:59 GMT", [0.5, 1.0, 2.0]),
    ],
)
def test_the_waits_double_and_are_as_long_as_the_server_asks(client, server, monkeypatch, asked, waits) -> None:
    server.faults.down, server.faults.retry_after = 3, asked
    asking, waited = client(model="teacher", retries=3, backoff_seconds=0.5), []
    monkeypatch.setattr(asking._server._closed, "wait", waited.append)
    with pytest.warns(UserWarning, match="does not answer"):
        asking.score(TEXTS, NAMES)
    assert waited == waits


@pytest.mark.parametrize(
    ("status", "begin"), [(404, "url: the address, api (vllm) or model"), (422, "url: the request for")]
)
def test_a_refusal_is_not_repeated(client, server, status, begin) -> None:
    server.faults.content, server.faults.status = b'{"error": {"message": "no such thing"}}', status
    said = message_of(ValueError, client(model="teacher"))
    assert said.startswith(begin)
    assert f"returned {status}: no such thing" in said
    assert server.num_requests == 1


def test_redirects_are_not_followed(client, server) -> None:
    server.faults.content, server.faults.status = b"", 307
    assert message_of(ValueError, client()).startswith("url: the address")


def test_the_key_is_sent(client, server, monkeypatch) -> None:
    server.key = SECRET
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    client().score(TEXTS, NAMES)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}


def test_no_key_is_sent_if_there_is_none(client, server) -> None:
    client().score(TEXTS, NAMES)
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_missing_key_is_named_by_its_variable(client, server) -> None:
    server.key = SECRET
    said = message_of(ValueError, client(key_variable="OTHER_VARIABLE"))
    assert said.startswith(
        "url: it asks for a key, and OTHER_VARIABLE is not set. Set this environment variable to the server's key."
    )


def test_a_key_that_is_not_accepted_is_not_shown(client, server, monkeypatch) -> None:
    """The server's answer repeats it."""
    server.key = "another"
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    said = message_of(ValueError, client())
    assert said.startswith(f"url: the key in {KEY_VARIABLE} is not accepted.")
    assert "Bearer ***" in said


@pytest.mark.parametrize("content", [SECRET.encode(), json.dumps({"choices": SECRET}).encode()])
def test_an_answer_that_repeats_the_key_does_not_show_it(client, server, monkeypatch, content) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server.faults.content = content
    said = message_of(ValueError, client(model="teacher"))
    assert SECRET not in said
    assert "***" in said


def test_the_key_is_not_stored(client, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    made = client()
    assert SECRET not in f"{made!r} {vars(made)} {vars(made._server)}"


def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(client, monkeypatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{SECRET}\nX-Other: header")
    with pytest.raises(ValueError, match=f"url: .* {KEY_VARIABLE} is not a valid key") as caught:
        client()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "begin"),
    [
        ({"url": "ftp://host"}, "url: expected http"),
        ({"url": "host:8000"}, "url: expected http"),
        ({"url": "http://host:many"}, "url: expected http"),
        ({"url": "http://user:word@host"}, "url: contains credentials"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"num_workers": 0}, "num_workers: "),
        ({"texts_per_request": 0}, "texts_per_request: "),
        ({"timeout": 0.0}, "timeout: expected a number > 0"),
        ({"retries": -1}, "retries: expected 0 or more"),
        ({"api": "openai"}, "api: expected vllm or sglang"),
    ],
)
def test_wrong_arguments_are_named(client, options, begin) -> None:
    with pytest.raises(ValueError, match=f"^{begin}") as caught:
        client(**options)
    assert "word" not in str(caught.value)


def test_closing_ends_a_request_that_the_server_has_not_answered(client, server) -> None:
    server.faults.delay = 5
    asking = client(model="teacher")
    future = asking.submit(TEXTS, NAMES)
    while not server.bodies:
        time.sleep(0.01)
    begin = time.monotonic()
    asking.close()
    assert time.monotonic() - begin < 1
    with pytest.raises(ConnectionError, match="were stopped"):
        future.result()


@pytest.mark.filterwarnings("ignore:.*does not answer")
def test_closing_ends_the_wait_for_the_next_attempt(client, server) -> None:
    server.faults.down = 100
    asking = client(model="teacher", backoff_seconds=60)
    future = asking.submit(TEXTS, NAMES)
    while not server.bodies:
        time.sleep(0.01)
    time.sleep(0.05)
    asking.close()
    with pytest.raises(ConnectionError, match="were stopped"):
        future.result()


def test_an_error_cancels_the_requests_that_have_not_begun(client, server) -> None:
    server.faults.content, server.faults.delay = b"no", 0.03
    message_of(ValueError, client(model="teacher", texts_per_request=1, num_workers=1))
    time.sleep(0.2)
    assert server.num_requests <= 2  # the second may have begun
