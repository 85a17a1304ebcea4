"""A teacher behind a server gives what the local one with the same k does, and ends a run with a clear message."""

from __future__ import annotations

import pytest
import torch
from loaded import frozen, routed_text
from logprob_server import LogprobServer

from lit_distill.functional import top_k
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, ReverseKL, TopKReverseKL
from lit_distill.teachers import MixedTeachers, ServerTeacher
from lit_distill.teachers.sparse import TopKRows

K = 6


def logits_of(teacher):
    def logits(ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor([ids])
        hidden = teacher(tokens, torch.ones_like(tokens))[0]
        return teacher.head().logits(hidden)

    return logits


@pytest.fixture
def local():
    return frozen(1)


@pytest.fixture
def server(local):
    with LogprobServer(logits_of(local)) as running:
        yield running


def opened(server, **settings) -> ServerTeacher:
    made = ServerTeacher(server.url, top_k=K, retries=1, **settings)
    made._ids = 41
    made.load(41, None)
    return made


def test_an_objective_on_more_tokens_than_the_server_tells_is_refused() -> None:
    def module(**settings) -> DistillationModule:
        teacher = ServerTeacher("http://localhost:9", top_k=16)
        mixed = MixedTeachers({"a": teacher, "b": ModelSpec("b")}, {"a": 0.5, "b": 0.5})
        kl = {"kl": TopKReverseKL(**settings)}
        DistillationModule(ModelSpec("none"), kl, mixed)  # the other knows all
        return DistillationModule(ModelSpec("none"), kl, teacher)

    module(top_k=16)
    module(top_k=32, support="student")
    words = "^objectives.kl: TopKReverseKL takes the teacher's 32 most probable tokens, but ServerTeacher knows 16. Set its top_k"
    with pytest.raises(ValueError, match=words):
        module(top_k=32)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("tail", ["spread", "renormalize"])
def test_the_loss_is_that_of_the_local_teachers_top_k(server, local, student, api, tail) -> None:
    text = routed_text(["x"] * 5)
    remote = opened(server, api=api, tail=tail)
    every = slice(0, int(text.target_mask.sum()))
    logits, labels = local.rows(text).logits(every), text.input_ids[text.target_mask]
    exact = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    expected = TopKRows(*top_k(logits, K), labels, exact, 41, tail)
    rows = remote.rows(text)
    torch.testing.assert_close(rows.logits(every).softmax(-1), expected.logits(every).softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.label_logprobs(labels), exact, rtol=1e-4, atol=1e-5)
    objective = ForwardKL() if tail == "renormalize" else ReverseKL()
    evaluator = ObjectiveEvaluator({"kd": objective}, student, remote, "model.objectives", 7)
    loss, _ = evaluator(text, {"kd": 1.0})
    assert loss.isfinite()
    remote.close()


def test_requests_are_sent_once_and_before_the_rows_are_asked_for(server, student) -> None:
    text = routed_text(["x"] * 5)
    remote = opened(server)
    evaluator = ObjectiveEvaluator({"kd": ForwardKL()}, student, remote, "model.objectives", 7)
    before = server.num_requests
    evaluator.prefetch(text, {"kd"})
    assert len(remote._pending) == 5
    evaluator(text, {"kd": 1.0})
    assert not remote._pending
    assert server.num_requests - before == 2  # four texts, and one
    remote.close()


def test_no_request_is_sent_for_objectives_without_a_teacher(server, student) -> None:
    remote = opened(server)
    evaluator = ObjectiveEvaluator({"kd": ForwardKL()}, student, remote, "model.objectives", 7)
    before = server.num_requests
    evaluator.prefetch(routed_text(["x"]), {"another"})
    assert server.num_requests == before
    remote.close()


def test_a_server_with_more_tokens_than_the_student_is_refused(server) -> None:
    remote = opened(server)
    remote._vocabulary_size = 5
    text = routed_text(["x"] * 2)
    with pytest.raises(ValueError, match=r"the student has only 5 tokens\. Serve the model whose tokenizer"):
        remote.rows(text).logits(slice(0, 3))
    remote.close()


def test_a_shift_by_one_token_ends_the_run_and_names_the_item(server) -> None:
    remote = opened(server)
    server.faults.shifted = True
    with pytest.raises(ValueError, match=r"item-\d"):
        remote.rows(routed_text(["x"] * 2)).logits(slice(0, 3))
