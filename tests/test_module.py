"""The module keeps its promises: the loss does not depend on the split of a batch, and nothing runs that nobody asked for."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import ForwardKL, LossTerm, NextToken, Objective


class ConfidentKL(Objective):
    """Counts only the tokens of which the teacher is sure: the count depends on values."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
        gap = (student_logits - teacher_logits).square().mean(dim=-1)
        sure = teacher_logits.softmax(dim=-1).amax(dim=-1) > 1 / 512 * 1.1
        return LossTerm((gap * sure).sum(), sure.sum(), {"sure": sure.sum()})


def data(**settings) -> ProceduralData:
    return ProceduralData(num_train=24, num_validation=10, num_test=4, batch_size=6, eval_batch_size=4, **settings)


def trainer(folder: Path, **settings) -> L.Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    settings = {"max_steps": 2, "limit_val_batches": 0, "log_every_n_steps": 1, **settings}
    return L.Trainer(default_root_dir=folder, accelerator="cpu", **quiet, **settings)


def module(pair: tuple[Path, Path], objectives: dict[str, Objective] | None = None, **settings) -> DistillationModule:
    student, teacher = pair
    objectives = objectives or {"kd": ForwardKL(), "ce": NextToken(weight=0.5)}
    return DistillationModule(ModelSpec(str(student)), objectives, ModelSpec(str(teacher)), **settings)


def fitted(pair, folder, objectives=None, trainer_settings=None, corpus=None, **settings) -> DistillationModule:
    learner = module(pair, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **settings)
    trainer(folder, **(trainer_settings or {})).fit(learner, data(corpus=corpus))
    return learner


def weights(learner: DistillationModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.student.parameters()])


@pytest.mark.parametrize(
    "objectives", [{"kd": ForwardKL(), "ce": NextToken(weight=0.5)}, {"own": ConfidentKL()}], ids=["rows", "values"]
)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 5])
def test_micro_batches_change_neither_loss_nor_weights(pair, tmp_path, objectives, micro_batch_size: int) -> None:
    whole = fitted(pair, tmp_path, objectives)
    split = fitted(pair, tmp_path, objectives, micro_batch_size=micro_batch_size)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-6)
    for name in objectives:
        torch.testing.assert_close(
            split.trainer.callback_metrics[f"train/{name}"],
            whole.trainer.callback_metrics[f"train/{name}"],
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_loss_is_the_mean_over_all_targets_of_the_batch(pair, tmp_path) -> None:
    learner = fitted(pair, tmp_path, {"ce": NextToken()}, {"max_steps": 1}, micro_batch_size=2)
    torch.manual_seed(0)
    fresh = module(pair, {"ce": NextToken()})
    fresh.configure_model()
    source = learner.trainer.datamodule
    batch = next(iter(source.train_dataloader())).sequences
    with torch.no_grad():
        logits = fresh.student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    labels = batch.input_ids.masked_fill(~batch.target_mask, -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(learner.trainer.callback_metrics["train/loss"], expected, rtol=1e-5, atol=1e-5)


def test_weights_are_factors_of_the_gradient(pair, tmp_path) -> None:
    start = module(pair)
    start.configure_model()
    once = fitted(pair, tmp_path, {"kd": ForwardKL(weight=1.0)}, {"max_steps": 1})
    thrice = fitted(pair, tmp_path, {"kd": ForwardKL(weight=3.0)}, {"max_steps": 1})
    torch.testing.assert_close(
        weights(thrice) - weights(start), 3 * (weights(once) - weights(start)), rtol=1e-3, atol=1e-6
    )


def test_gradient_clipping_of_the_trainer_is_honoured(pair, tmp_path) -> None:
    start = module(pair)
    start.configure_model()
    clipped = fitted(pair, tmp_path, trainer_settings={"max_steps": 1, "gradient_clip_val": 1e-3})
    moved = torch.linalg.vector_norm(weights(clipped) - weights(start))
    torch.testing.assert_close(moved, torch.tensor(0.5e-3), rtol=1e-2, atol=1e-5)


def test_gradient_accumulation_of_the_trainer_is_refused_with_what_to_use(pair, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches: 4 .*model\.micro_batch_size"):
        fitted(pair, tmp_path, trainer_settings={"accumulate_grad_batches": 4})


def test_the_teacher_never_learns_and_is_in_no_checkpoint_and_no_optimiser(pair, tmp_path) -> None:
    learner = module(pair)
    learner.configure_model()
    before = [p.clone() for p in learner.teacher.lm.parameters()]
    run = trainer(tmp_path)
    run.fit(learner, data())
    assert all(torch.equal(a, b) for a, b in zip(before, learner.teacher.lm.parameters(), strict=True))
    assert not learner.teacher.lm.training
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"student.{name}" for name in learner.student.state_dict()}
    optimised = sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"])
    assert optimised == len(list(learner.student.parameters()))


def test_fine_tuning_loads_and_runs_no_teacher_in_training(pair, tmp_path) -> None:
    learner = module(pair, {"ce": NextToken()})
    learner.configure_model()
    calls = []
    learner.teacher.lm.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer(tmp_path).fit(learner, data())
    assert not calls


def test_one_body_forward_of_each_model_per_micro_batch(pair, tmp_path) -> None:
    learner = module(pair, micro_batch_size=3)
    learner.configure_model()
    calls = {"student": 0, "teacher": 0}
    learner.student.register_forward_pre_hook(lambda *_: calls.__setitem__("student", calls["student"] + 1))
    learner.teacher.lm.register_forward_pre_hook(lambda *_: calls.__setitem__("teacher", calls["teacher"] + 1))
    trainer(tmp_path, max_steps=2).fit(learner, data())
    assert calls == {"student": 4, "teacher": 4}


def test_corpus_objectives_add_to_the_loss(pair, tmp_path) -> None:
    from lit_distill.data import Corpus

    (tmp_path / "corpus.txt").write_text("Tom is a red cat.\n\n" * 40)
    corpus = Corpus(str(tmp_path / "corpus.txt"), length=16, batch_size=2)
    learner = fitted(
        pair, tmp_path, {"kd": ForwardKL()}, corpus=corpus, corpus_objectives={"lm": NextToken(weight=0.3)}
    )
    figures = learner.trainer.callback_metrics
    torch.testing.assert_close(figures["train/loss"], figures["train/kd"] + 0.3 * figures["train/lm"])
    for weights in ({"kd": 0.0, "lm": 1.0}, {"kd": 1.0, "lm": 0.0}):  # a text of which nobody asks anything is not read
        objectives = {"kd": ForwardKL(weight=weights["kd"])}, {"lm": NextToken(weight=weights["lm"])}
        learner = fitted(pair, tmp_path, objectives[0], corpus=corpus, corpus_objectives=objectives[1])
        asked = {name for name in weights if f"train/{name}" in learner.trainer.callback_metrics}
        assert asked == {name for name, weight in weights.items() if weight}
    with pytest.raises(ValueError, match=r"model\.corpus_objectives: there is no corpus.*data\.init_args\.corpus"):
        fitted(pair, tmp_path, {"kd": ForwardKL()}, corpus_objectives={"lm": NextToken()})


def test_held_out_figures_equal_a_plain_computation(pair, tmp_path) -> None:
    learner = module(pair, micro_batch_size=3)
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.validate(learner, data(), verbose=False)
    nll = teacher_nll = forward = reverse = agree = count = 0.0
    for batch in run.datamodule.val_dataloader():
        text = batch.sequences
        with torch.no_grad():
            both = [
                m(input_ids=text.input_ids, attention_mask=text.attention_mask).logits
                for m in (learner.student.model, learner.teacher.lm.model)
            ]
        rows = text.target_mask[:, 1:]
        log_q, log_p = (logits[:, :-1][rows].double().log_softmax(-1) for logits in both)
        labels = text.input_ids[:, 1:][rows][:, None]
        nll -= log_q.gather(-1, labels).sum()
        teacher_nll -= log_p.gather(-1, labels).sum()
        forward += (log_p.exp() * (log_p - log_q)).sum()
        reverse += (log_q.exp() * (log_q - log_p)).sum()
        agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum()
        count += rows.sum()
    expected = {
        "perplexity": (nll / count).exp(),
        "teacher_perplexity": (teacher_nll / count).exp(),
        "forward_kl": forward / count,
        "reverse_kl": reverse / count,
        "top1_agreement": agree / count,
        "loss": forward / count + 0.5 * nll / count,
    }
    for name, value in expected.items():
        torch.testing.assert_close(run.callback_metrics[f"val/{name}"].double(), value.double(), rtol=1e-4, atol=1e-5)


def test_an_objective_without_a_teacher_is_refused_before_anything_loads(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^objectives\.kd: ForwardKL needs `teacher_logits`"):
        DistillationModule(ModelSpec("/nowhere"), {"kd": ForwardKL()})


def test_a_watched_validation_figure_without_validation_is_refused(pair, tmp_path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    run = L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        callbacks=[ModelCheckpoint(monitor="val/loss")],
        enable_progress_bar=False,
    )
    with pytest.raises(ValueError, match=r"checkpoint\.monitor: val/loss"):
        run.fit(module(pair), data())


def test_a_run_that_diverges_stops_and_says_so(pair, tmp_path) -> None:
    learner = module(pair, optimizer=lambda p: torch.optim.SGD(p, lr=1e12))
    run = trainer(tmp_path, max_steps=8)
    with pytest.raises(
        ValueError, match=r"(loss is (nan|inf)|is not finite) at step \d+: the run has diverged\. Lower model"
    ):
        run.fit(learner, data())


def test_an_objective_of_weight_zero_does_not_run_nor_the_teacher_for_it(pair, tmp_path) -> None:
    learner = module(pair, {"ce": NextToken(), "kd": ForwardKL(weight=0.0)})
    learner.configure_model()
    calls = []
    learner.teacher.lm.register_forward_pre_hook(lambda *_: calls.append(1))
    run = trainer(tmp_path)
    run.fit(learner, data())
    assert not calls
    assert "train/kd" not in run.callback_metrics
    with pytest.raises(ValueError, match=r"model\.objectives: every weight is 0"):
        fitted(pair, tmp_path, {"ce": NextToken(weight=0.0)})


def test_new_weights_are_those_of_the_seed_whatever_was_drawn_before(pair, monkeypatch) -> None:
    def drawn(seed: str) -> torch.Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        learner = DistillationModule(ModelSpec(str(pair[0]), from_scratch=True), {"ce": NextToken()})
        before = torch.get_rng_state()
        learner.configure_model()
        assert torch.equal(torch.get_rng_state(), before)
        return learner.student.model.get_input_embeddings().weight.detach()

    first = drawn("5")
    torch.rand(3)
    assert torch.equal(drawn("5"), first)
    assert not torch.equal(drawn("6"), first)
