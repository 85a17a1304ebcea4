"""What is logged of sampled responses equals slow computations on the same responses, however they are batched."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training import quiet_trainer

from lit_distill.callbacks import OnPolicyEvaluator
from lit_distill.data import ProceduralData
from lit_distill.evaluation.checkers import Checker
from lit_distill.evaluation.on_policy import OnPolicyTerms
from lit_distill.generation import SamplingParams
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, NextToken
from lit_distill.teachers import AlignedTeacher, CachedTeacher, LocalTeacher, MixedTeachers, PromptedTeacher
from lit_distill.types import ArgumentError

LENGTH, RESPONSES, OVERLAP = 6, 4, 5
SETTINGS: dict[str, Any] = {"num_responses": RESPONSES, "max_new_tokens": LENGTH, "overlap_top_k": OVERLAP, "seed": 3}
COMPARED = set(OnPolicyTerms.metric_names)


class EvenLength(Checker):
    """A rule that some responses of a random model follow: an even number of characters is right, a number by 3 half right."""

    def __call__(self, response: str, references) -> float:
        assert references
        return 1.0 if len(response) % 2 == 0 else 0.5 if len(response) % 3 == 0 else 0.0


def learner_of(pair, student: int = 0, **settings: Any) -> DistillationModule:
    settings = {"teacher": ModelSpec(str(pair[1])), "objectives": {"kd": ForwardKL()}, **settings}
    return DistillationModule(ModelSpec(str(pair[student])), **settings)


def data_of(**settings: Any) -> ProceduralData:
    sizes = {"num_train": 8, "num_validation": 5, "num_test": 5, "batch_size": 4, "eval_batch_size": 2}
    return ProceduralData(**{**sizes, **settings})


def measured(folder, learner, evaluator, stage: str = "test", **data: Any) -> dict[str, float]:
    """The metrics of the evaluator in a test or validation."""
    trainer = quiet_trainer(folder, max_steps=-1, callbacks=[evaluator], limit_val_batches=1.0)
    getattr(trainer, stage)(learner, data_of(**data), verbose=False)
    prefix = "val/" if stage == "validate" else "test/"
    metrics = {name.removeprefix(prefix): float(value) for name, value in trainer.callback_metrics.items()}
    ours = (*OnPolicyTerms.metric_names, "sampled_", "pass_at_", "mean_at_")
    return {name: value for name, value in metrics.items() if name.startswith(ours)}


@pytest.fixture(scope="module")
def known(pair, tmp_path_factory):
    """A tested learner, its data, and the metrics."""
    learner = learner_of(pair, micro_batch_size=2)
    evaluator = OnPolicyEvaluator(-1, checker=EvenLength(), k=[1, 2, 4], **SETTINGS)
    folder = tmp_path_factory.mktemp("test")
    trainer = quiet_trainer(folder, max_steps=-1, callbacks=[evaluator])
    data = data_of(eval_batch_size=3)
    trainer.test(learner, data, verbose=False)
    return learner, data, {name: float(value) for name, value in trainer.callback_metrics.items()}


def responses_of(learner, batch) -> list[list[list[int]]]:
    """The ids of the responses to every prompt, by the keys that the evaluator is documented to use."""
    found: list[list[list[int]]] = [[] for _ in batch.ids]
    for sample in range(RESPONSES):
        keys = tuple(f"{item}/{sample}" if sample else item for item in batch.ids)
        drawn = learner.generate(batch.prompts, keys, SamplingParams(LENGTH, 1.0), 3)
        for row, (ids, mask) in enumerate(zip(drawn.ids, drawn.mask, strict=True)):
            found[row].append(ids[mask].tolist())
    return found


def test_scores_and_lengths_equal_a_slow_computation_on_the_same_responses(known) -> None:
    learner, data, metrics = known
    shares: dict[int, list[float]] = {1: [], 2: [], 4: []}
    scores, lengths, cut_off = [], [], []
    for batch in data.test_dataloader():
        for responses in responses_of(learner, batch):
            texts = [learner.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
            marks = [EvenLength()(text, ["any"]) for text in texts]
            for k, share in shares.items():
                subsets = list(combinations(marks, k))
                share.append(sum(max(subset) == 1 for subset in subsets) / len(subsets))
            scores += marks
            lengths += [len(ids) for ids in responses]
            cut_off += [not set(ids) & set(learner.stop_ids) for ids in responses]
    for k, share in shares.items():
        assert metrics[f"test/pass_at_{k}"] == pytest.approx(100 * sum(share) / 5, rel=1e-5)
    assert 0 < metrics["test/pass_at_1"] < metrics["test/pass_at_2"] < 100
    assert metrics["test/mean_at_4"] == pytest.approx(100 * sum(scores) / len(scores), rel=1e-5)
    assert metrics["test/mean_at_4"] != pytest.approx(metrics["test/pass_at_1"])  # the halves count in the mean alone
    assert metrics["test/sampled_length"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
    assert metrics["test/sampled_unfinished"] == pytest.approx(sum(cut_off) / len(cut_off), rel=1e-5)


def test_the_comparison_with_the_teacher_equals_one_forward_of_transformers_for_every_token(known) -> None:
    learner, data, metrics = known
    models = learner.student.model.eval(), learner.teacher.lm.model
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in data.test_dataloader():
        for prompt, responses in zip(batch.prompt_texts, responses_of(learner, batch), strict=True):
            for response in responses:
                prefix = learner.tokenizer(prompt).input_ids
                for token in response:
                    with torch.no_grad():
                        log_q, log_p = (
                            m(torch.tensor([prefix])).logits[0, -1].double().log_softmax(-1) for m in models
                        )
                    tops = [set(row.topk(OVERLAP).indices.tolist()) for row in (log_q, log_p)]
                    entropies = [-(row.exp() * row).sum() for row in (log_q, log_p)]
                    divergence = (log_q.exp() * (log_q - log_p)).sum()
                    sums += torch.tensor([len(tops[0] & tops[1]) / OVERLAP, *entropies, divergence])
                    count += 1
                    prefix = [*prefix, token]
    for name, value in zip(OnPolicyTerms.metric_names, (sums / count).tolist(), strict=True):
        assert metrics[f"test/{name}"] == pytest.approx(value, rel=1e-4), name
    assert 0 < metrics["test/top_k_overlap"] < 1


@pytest.mark.parametrize(("eval_batch_size", "micro_batch_size"), [(1, None), (5, 1), (4, 3)])
def test_the_size_of_batches_changes_nothing(known, pair, tmp_path, eval_batch_size, micro_batch_size) -> None:
    evaluator = OnPolicyEvaluator(-1, checker=EvenLength(), k=[1, 2, 4], **SETTINGS)
    learner = learner_of(pair, micro_batch_size=micro_batch_size)
    found = measured(tmp_path, learner, evaluator, eval_batch_size=eval_batch_size)
    assert len(found) == 10
    for name, value in found.items():
        assert value == pytest.approx(known[2][f"test/{name}"], rel=1e-4, abs=1e-6), name


def test_forward_passes_for_the_sake_of_other_ranks_change_nothing(known, pair, tmp_path, monkeypatch) -> None:
    calls = []

    def most(pl_module, count: int) -> int:
        calls.append(count)
        return count + 2

    monkeypatch.setattr("lit_distill.module.max_over_ranks", most)
    evaluator = OnPolicyEvaluator(-1, checker=EvenLength(), k=[1, 2, 4], **SETTINGS)
    found = measured(tmp_path, learner_of(pair, micro_batch_size=2), evaluator, eval_batch_size=3)
    assert calls == [2] * 5 + [1] * 5  # micro-batches of three prompts and of two: four responses, and the dataset
    for name, value in found.items():
        assert value == pytest.approx(known[2][f"test/{name}"], rel=1e-4, abs=1e-6), name


def test_a_student_that_is_its_teacher_agrees_with_it(pair, tmp_path) -> None:
    found = measured(tmp_path, learner_of(pair, student=1), OnPolicyEvaluator(-1, **SETTINGS))
    assert found["top_k_overlap"] == 1
    assert found["on_policy_reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert found["on_policy_student_entropy"] == pytest.approx(found["on_policy_teacher_entropy"])


def test_it_is_off_by_default_and_generates_nothing(pair, tmp_path, monkeypatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("generated")

    monkeypatch.setattr(DistillationModule, "generate", never)
    assert measured(tmp_path, learner_of(pair), evaluator := OnPolicyEvaluator()) == {}
    assert evaluator.metric_names(None, learner_of(pair)) == []  # type: ignore[arg-type]


@pytest.fixture
def references_of(monkeypatch):
    """Lets so many items of a batch, the first ones, keep their references."""

    def keep(count: int) -> None:
        def on_batch(self, trainer, pl_module, batch) -> None:
            kept = tuple(given if row < count else () for row, given in enumerate(batch.references))
            object.__setattr__(batch, "references", kept if count else ())
            original(self, trainer, pl_module, batch)

        original = OnPolicyEvaluator.on_batch
        monkeypatch.setattr(OnPolicyEvaluator, "on_batch", on_batch)

    return keep


def test_without_references_there_are_lengths_and_the_comparison(pair, tmp_path, references_of) -> None:
    references_of(0)
    with pytest.warns(UserWarning, match="on_policy: no prompt of the val data has references, so pass_at_1"):
        found = measured(tmp_path, learner_of(pair), OnPolicyEvaluator(3, **SETTINGS), "validate")
    assert set(found) == {"sampled_length", "sampled_unfinished", *COMPARED}


def test_a_checkpoint_that_waits_for_checked_responses_ends_the_run_with_what_to_do(
    pair, tmp_path, references_of
) -> None:
    references_of(0)
    keep = ModelCheckpoint(tmp_path, monitor="val/pass_at_4", mode="max")
    evaluator = OnPolicyEvaluator(3, **SETTINGS)
    trainer = quiet_trainer(tmp_path, 2, callbacks=[evaluator, keep], limit_val_batches=1, enable_checkpointing=True)
    with pytest.raises(
        ArgumentError, match=r"^monitor: no prompt of the val data has references, .* \{references: answer\}"
    ):
        trainer.fit(learner_of(pair), data_of())


def test_prompts_without_references_count_in_the_lengths_alone(pair, tmp_path, references_of) -> None:
    learner = learner_of(pair)
    whole = measured(tmp_path, learner, OnPolicyEvaluator(-1, checker=EvenLength(), **SETTINGS), eval_batch_size=5)
    references_of(1)
    found = measured(tmp_path, learner, OnPolicyEvaluator(-1, checker=EvenLength(), **SETTINGS), eval_batch_size=5)
    assert found["sampled_length"] == whole["sampled_length"]
    (batch,) = learner.trainer.datamodule.test_dataloader()
    texts = [learner.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses_of(learner, batch)[0]]
    assert found["mean_at_4"] == pytest.approx(25 * sum(EvenLength()(text, ["any"]) for text in texts))
    assert found["mean_at_4"] != whole["mean_at_4"]


def test_without_a_teacher_there_is_no_comparison(pair, tmp_path) -> None:
    learner = learner_of(pair, teacher=None, objectives={"ce": NextToken()})
    found = measured(tmp_path, learner, OnPolicyEvaluator(2, **SETTINGS))
    assert set(found) == {"pass_at_1", "pass_at_4", "mean_at_4", "sampled_length", "sampled_unfinished"}


def test_it_says_once_that_a_teacher_does_not_answer_for_generated_texts(pair, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lit_distill.callbacks.on_policy.rank_zero_info", said.append)
    measured(tmp_path, learner_of(pair), OnPolicyEvaluator(2, **SETTINGS))
    assert not said
    monkeypatch.setattr("lit_distill.callbacks.on_policy._answers_student", lambda teacher: False)
    evaluator = OnPolicyEvaluator(2, **SETTINGS)
    for _ in range(2):
        assert not set(measured(tmp_path, learner_of(pair), evaluator)) & set(COMPARED)
    assert len(said) == 1
    assert said[0].startswith("on_policy: top_k_overlap, on_policy_student_entropy")


def teachers() -> dict[str, tuple[Any, bool]]:
    local = ModelSpec("nowhere")
    return {
        "none": (None, False),
        "local": (LocalTeacher(local), True),
        "with its own prompt": (PromptedTeacher(local), True),
        "several": (MixedTeachers({"a": local, "b": local}), True),
        "one of them a cache": (MixedTeachers({"a": local, "b": CachedTeacher("nowhere")}), False),
        "a cache": (CachedTeacher("nowhere"), False),
        "another tokenizer": (AlignedTeacher(local), False),
    }


@pytest.mark.parametrize("kind", teachers())
def test_a_teacher_is_compared_if_it_answers_for_every_token_of_generated_texts(kind: str) -> None:
    teacher, compared = teachers()[kind]
    run: Any = SimpleNamespace(teacher_config=teacher)
    names = set(OnPolicyEvaluator(2).metric_names(run, run))
    assert {"val/pass_at_1", "val/pass_at_8", "val/mean_at_8", "val/sampled_length"} <= names
    assert ({f"val/{name}" for name in COMPARED} <= names) == compared


def test_every_second_validation_samples_and_a_run_that_changes_is_warned_of(pair, tmp_path) -> None:
    evaluator = OnPolicyEvaluator(2, every_n_validations=2, **SETTINGS)
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    seen = []

    def log(self, metrics) -> None:
        seen.append((self.global_step, set(metrics)))
        if self.global_step == 2:
            evaluator._runaway.first = [0.5, 0.0]  # the next length is more than four times that
        original(self, metrics)

    original = DistillationModule.log_metrics_at_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationModule, "log_metrics_at_step", log)
        trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[evaluator], limit_val_batches=1.0, **settings)
        with pytest.warns(
            UserWarning, match=r"run away at step 3\. First validation -> now: length 0\.5 -> \d"
        ) as told:
            trainer.fit(learner_of(pair), data_of(num_train=24))
    assert [step for step, names in seen if "val/sampled_length" in names] == [1, 3, 5]
    assert len([one for one in told if "run away" in str(one.message)]) == 1


def test_a_test_warns_of_nothing(pair, tmp_path, recwarn) -> None:
    evaluator = OnPolicyEvaluator(2, **SETTINGS)
    evaluator._runaway.first = [0.01, 0.0]
    measured(tmp_path, learner_of(pair), evaluator)
    assert not [one for one in recwarn if "run away" in str(one.message)]


def test_a_resumed_run_compares_with_the_same_validations_if_they_sample_alike() -> None:
    before = OnPolicyEvaluator(5)
    before._validations = 3
    before._runaway.check(1, 10.0, 0.1, 0.9)
    alike, other = OnPolicyEvaluator(5, every_n_validations=2), OnPolicyEvaluator(5, max_new_tokens=512)
    for after in (alike, other):
        after.load_state_dict(before.state_dict())
        assert after._validations == 3
    assert alike._runaway.state_dict() == {"first": [10.0, 0.1], "highest_overlap": 0.9, "warned": []}
    assert other._runaway.first is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_prompts": -3}, r"^max_prompts: .*-3"),
        ({"every_n_validations": 0}, r"^every_n_validations: .* 0"),
        ({"num_responses": 0}, r"^num_responses: .* 0"),
        ({"overlap_top_k": 0}, r"^overlap_top_k: .* 0"),
        ({"temperature": 0.0}, r"^num_responses: 8 with temperature 0.*temperature: 1\.0"),
        ({"k": []}, r"^k: .*\(8\), got \[\]"),
        ({"k": [1, 9]}, r"^k: .*\(8\), got \[1, 9\]"),
        ({"k": [0]}, r"^k: .*got \[0\]"),
        ({"k": [2, 2]}, r"^k: .*got \[2, 2\]"),
    ],
)
def test_arguments_that_cannot_be_are_refused_with_their_key(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnPolicyEvaluator(**given)


def test_one_response_may_be_greedy() -> None:
    assert OnPolicyEvaluator(num_responses=1, temperature=0.0).k == [1]
