"""A second frozen model beside the teacher: what objectives get of it, and what a run does with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import ragged_text, tiny_llama
from training import learner_of, quiet_trainer, weights

from lit_distill.data import ProceduralData
from lit_distill.functional import extrapolated_reverse_kl, reverse_kl
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM, LoraSpec, ModelSpec, common_vocabulary_size
from lit_distill.module import DistillationModule
from lit_distill.objectives import DirectPreference, ExtrapolatedReverseKL, ForwardKL, NextToken, ReferenceKL
from lit_distill.sources import AdvantageConfig, ResponsePairs, StudentRollouts, TeacherMixedRollouts
from lit_distill.teachers import CachedTeacher, FrozenTeacher, StudentTeacher

SIZES = {"num_validation": 4, "num_test": 2, "batch_size": 6}


@pytest.fixture
def models() -> tuple[CausalLM, FrozenTeacher, FrozenTeacher]:
    torch.manual_seed(0)
    student, teacher, reference = (CausalLM(tiny_llama(hidden)) for hidden in (16, 24, 8))
    return student, FrozenTeacher(teacher), FrozenTeacher(reference)


def whole_logits(lm: CausalLM, text) -> torch.Tensor:
    """[N, V] of the targets, from one whole forward pass."""
    logits = lm.model(input_ids=text.input_ids, attention_mask=text.attention_mask).logits
    return logits[:, :-1][text.target_mask[:, 1:]]


@pytest.mark.parametrize("objective", [ReferenceKL(), ExtrapolatedReverseKL(scale=1.5)], ids=["reference", "both"])
@pytest.mark.parametrize("recorded", [False, True], ids=["texts", "rollouts"])
def test_an_objective_gets_the_references_logits(models, objective, recorded) -> None:
    student, teacher, reference = models
    text = ragged_text()
    if recorded:  # the teacher's hidden states of a rollout are not the reference's
        hidden = teacher(text.input_ids, text.attention_mask)
        text = replace(text, teacher_hidden=torch.roll(hidden, 1, dims=1))
    evaluator = ObjectiveEvaluator({"o": objective}, student, teacher, "objectives", 3, reference)
    loss, terms = evaluator(text, {"o": 1.0})
    loss.backward()
    ours = student.model.lm_head.weight.grad.clone()
    student.zero_grad()
    q, p, r = (whole_logits(lm, text) for lm in (student, teacher.lm, reference.lm))
    exact = reverse_kl(q, r) if isinstance(objective, ReferenceKL) else extrapolated_reverse_kl(q, p, r, 1.5)
    exact.sum().backward()
    torch.testing.assert_close(terms["o"].total, exact.sum().detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, student.model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_it_does_not_run_unless_an_objective_asks_for_it(models, monkeypatch) -> None:
    student, teacher, reference = models
    monkeypatch.setattr(reference, "rows", None)
    evaluator = ObjectiveEvaluator({"kd": ForwardKL(), "stay": ReferenceKL()}, student, teacher, "o", 3, reference)
    evaluator(ragged_text(), {"kd": 1.0})
    with pytest.raises(TypeError):
        evaluator(ragged_text(), {"stay": 1.0})


def trained(pair, folder, objectives, source=None, steps: int = 2, **settings) -> DistillationModule:
    module = learner_of(pair, objectives, source, **settings)
    quiet_trainer(folder, steps, limit_val_batches=1).fit(module, ProceduralData(12, **SIZES))
    return module


def test_a_run_with_the_student_as_reference_starts_at_zero_and_stays_closer(pair, tmp_path) -> None:
    start = ModelSpec(str(pair[0]))

    def far(weight: float) -> float:
        objectives = {"kd": ForwardKL(), "stay": ReferenceKL(weight=weight)}
        module = trained(pair, tmp_path, objectives, steps=10, lr=0.5, reference=start)
        return float(module.trainer.callback_metrics["val/stay"])

    free, held = far(1e-6), far(5.0)
    assert 0 < held < 0.5 * free
    module = trained(pair, tmp_path, {"stay": ReferenceKL()}, reference=start)
    assert float(module.trainer.callback_metrics["train/stay"]) == pytest.approx(0.0, abs=1e-6)


def test_the_reference_is_no_part_of_the_checkpoint_and_is_not_trained(pair, tmp_path) -> None:
    module = trained(pair, tmp_path, {"kd": ForwardKL(), "stay": ReferenceKL()}, reference=ModelSpec(str(pair[0])))
    assert not any("reference" in name for name in module.state_dict())
    before = CausalLM(type(module.student.model).from_pretrained(pair[0]))
    for mine, theirs in zip(module.reference.lm.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine.float(), theirs)


@pytest.mark.parametrize(
    "source",
    [StudentRollouts(max_new_tokens=4), ResponsePairs(max_new_tokens=4)],
    ids=["rollouts", "pairs"],
)
def test_every_source_brings_it(pair, tmp_path, source) -> None:
    objectives = {"stay": ReferenceKL(), "kd": ForwardKL()}
    if isinstance(source, ResponsePairs):
        objectives["dpkd"] = DirectPreference()
    module = trained(pair, tmp_path, objectives, source, reference=StudentTeacher(every_n_steps=100))
    assert weights(module).isfinite().all()
    assert float(module.trainer.callback_metrics["train/stay"]) > 0


def test_adapters_have_their_base_as_reference(pair, tmp_path) -> None:
    shared = ModelSpec(str(pair[0]), shared_with_student=True)
    student = ModelSpec(str(pair[0]), lora=LoraSpec(r=2))
    module = DistillationModule(
        student, {"kd": ForwardKL(), "stay": ReferenceKL()}, ModelSpec(str(pair[1])), reference=shared
    )
    quiet_trainer(tmp_path, 2).fit(module, ProceduralData(12, **SIZES))
    assert module.reference.lm is module.student


def test_a_reference_that_nothing_uses_is_not_loaded(pair) -> None:
    with pytest.warns(UserWarning, match=r"model\.reference: neither the source nor an objective uses it"):
        module = DistillationModule(ModelSpec(str(pair[0])), {"ce": NextToken()}, reference=ModelSpec(str(pair[0])))
    assert module.frozen_configs == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"objectives": {"stay": ReferenceKL()}},
            r"objectives\.stay: .* there is no reference model\. Set model\.reference",
        ),
        (
            {"objectives": {"ce": NextToken()}, "corpus_objectives": {"stay": ReferenceKL()}},
            r"corpus_objectives\.stay: .* there is no reference model",
        ),
        (
            {
                "objectives": {"ce": NextToken()},
                "source": TeacherMixedRollouts(scoring=AdvantageConfig(extrapolation=1.5)),
            },
            r"source: the source TeacherMixedRollouts needs a reference model",
        ),
        (
            {"objectives": {"stay": ReferenceKL()}, "reference": CachedTeacher("c"), "source": StudentRollouts()},
            r"path: c holds no cache",
        ),
    ],
    ids=["objectives", "corpus", "source", "cache"],
)
def test_what_cannot_be_is_refused_before_anything_loads(pair, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        DistillationModule(ModelSpec(str(pair[0])), teacher=ModelSpec(str(pair[1])), **settings)


def test_another_reference_is_refused_on_resume(pair, tmp_path) -> None:
    file = tmp_path / "last.ckpt"

    def fit(reference: int, steps: int, ckpt_path=None) -> None:
        module = learner_of(pair, {"stay": ReferenceKL(), "kd": ForwardKL()}, reference=ModelSpec(str(pair[reference])))
        trainer = quiet_trainer(tmp_path, steps)
        trainer.fit(module, ProceduralData(12, **SIZES), ckpt_path=ckpt_path)
        trainer.save_checkpoint(file)

    fit(0, 1)
    fit(0, 2, file)
    with pytest.raises(ValueError, match=r"model\.reference\.path: .* another model than the checkpoint's reference"):
        fit(1, 3, file)


def test_a_reference_of_another_tokenizer_is_named_as_the_reference(make_tokenizer) -> None:
    one, other = (make_tokenizer(["<unk>", "<s>", "</s>", letter]) for letter in "ab")
    with pytest.raises(ValueError, match=r"^reference: .* 3 is 'a' in the student and 'b' in the reference") as error:
        common_vocabulary_size(one, other, 4, 4, "reference")
    assert "teacher" not in str(error.value)
