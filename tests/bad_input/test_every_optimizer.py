"""Every optimiser and scheduler of torch takes steps to the end of the run, or is refused before any weights load."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch import Callback
from torch.optim import lr_scheduler
from training import learner_of, quiet_trainer, weights

from lit_distill.data import ProceduralData
from lit_distill.objectives import ForwardKL, PolicyGradient, ReverseKL
from lit_distill.sources import TeacherMixedRollouts
from lit_distill.validation.optimizer import check_optimizer
from lit_distill.validation.run_length import run_length

pytestmark = pytest.mark.slow

REFUSED_OPTIMIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "torch.optim.LBFGS": ({}, r"LBFGS "),
    "torch.optim.Muon": ({}, r"Muon only supports 2D parameters"),
    "torch.optim.SparseAdam": ({}, r"SparseAdam fails at its first step: SparseAdam does not support dense gradients"),
    "transformers.Adafactor": ({"eps": 1e-8}, r"Adafactor fails at its first step: .*Correct its init_args"),
    "torch.optim.AdamW": ({"fused": True, "foreach": True}, r"`fused` and `foreach` cannot be `True` together"),
    "torch.optim.RMSprop": ({"eps": 0.0, "alpha": 1.0}, r"RMSprop makes weights NaN or infinite at its first step"),
}
NAMES = [f"torch.optim.{n}" for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)]
OPTIMIZERS = [n for n in NAMES if not n.endswith(("Optimizer", "LBFGS", "Muon", "SparseAdam"))]

STEPS = 7
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"total_iters": 3},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.2},
    "ExponentialLR": {"gamma": 0.9},
    "LambdaLR": {"lr_lambda": "math.cos"},
    "LinearLR": {"total_iters": 3},
    "MultiStepLR": {"milestones": [2, 4]},
    "MultiplicativeLR": {"lr_lambda": "math.cos"},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": STEPS},
    "PolynomialLR": {"total_iters": 3},
    "StepLR": {"step_size": 2},
}
REFUSED_SCHEDULERS: dict[str, tuple[dict[str, Any], str]] = {
    "ChainedScheduler": ({}, r"model\.lr_scheduler: "),
    "LRScheduler": ({}, r"model\.lr_scheduler: "),
    "OneCycleLR": (
        {"max_lr": 0.1, "total_steps": 3},
        r"model\.lr_scheduler\.total_steps: OneCycleLR ends after 3 optimiser steps, and the run has 4\. .*WarmupCosine",
    ),
    "ReduceLROnPlateau": ({}, r"model\.lr_scheduler: ReduceLROnPlateau needs a metric.*WarmupCosine"),
    "SequentialLR": (
        {
            "schedulers": [{"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2}}],
            "milestones": [],
        },
        r"model\.lr_scheduler",
    ),
}


@pytest.fixture(scope="module")
def parser(pair, tmp_path_factory):
    config = write(tiny_config(pair), tmp_path_factory.mktemp("c") / "c.yaml")
    return run("--config", config, run=False).parser, config


def in_yaml(parser, folder, key: str, name: str, arguments: dict[str, Any]):
    """The module of a config in which ``key`` is this class."""
    second = write({"model": {key: {"class_path": name, "init_args": arguments}}}, folder / "second.yaml")
    words = ["--config", str(parser[1]), "--config", str(second)]
    return parser[0].instantiate_classes(parser[0].parse_args(words)).model


def test_somebody_has_decided_about_every_scheduler_of_this_torch() -> None:
    undecided = set(lr_scheduler.__all__) ^ (SCHEDULERS.keys() | REFUSED_SCHEDULERS.keys())
    assert not undecided, f"decide about it: {sorted(undecided)} of torch's schedulers is new or gone"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMIZERS, "transformers.Adafactor"])
def test_an_optimiser_learns(pair, parser, tmp_path, name: str) -> None:
    factory = in_yaml(parser, tmp_path, "optimizer", name, {}).optimizer_factory
    learner = learner_of(pair, {"kd": ForwardKL()}, optimizer=factory)
    data = ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2)
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(learner, data)
    untrained = learner_of(pair, {"kd": ForwardKL()})
    untrained.trainer = trainer
    untrained.configure_model()
    assert not torch.equal(weights(learner), weights(untrained))
    assert weights(learner).isfinite().all()


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_an_optimiser_that_fails_at_its_first_step_is_refused_with_its_key(refusal, name: str) -> None:
    arguments, words = REFUSED_OPTIMIZERS[name]
    message = refusal({"model.optimizer": {"class_path": name, "init_args": arguments}})
    assert re.search(rf"model\.optimizer: .*{words}", message, re.DOTALL), message


def test_an_optimiser_of_matrices_may_train_adapters(parser, tmp_path) -> None:
    muon = in_yaml(parser, tmp_path, "optimizer", "torch.optim.Muon", {}).optimizer_factory
    check_optimizer(muon, None, vectors=False)
    with pytest.raises(ValueError, match="2D"):
        check_optimizer(muon, None)


def test_the_trial_draws_nothing_from_the_run() -> None:
    state = torch.random.get_rng_state()
    check_optimizer(lambda groups: torch.optim.SGD(groups, lr=torch.rand(()).item()), None)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_to_the_end_of_the_run(pair, parser, tmp_path, name: str) -> None:
    scheduler = f"torch.optim.lr_scheduler.{name}"
    factory = in_yaml(parser, tmp_path, "lr_scheduler", scheduler, SCHEDULERS[name]).lr_scheduler_factory
    learner = learner_of(pair, {"kd": ForwardKL()}, lr_scheduler=factory)
    data = ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4, eval_batch_size=2)
    trainer = quiet_trainer(tmp_path, max_steps=STEPS)
    trainer.fit(learner, data)
    assert trainer.global_step == STEPS


@pytest.mark.parametrize("name", REFUSED_SCHEDULERS)
def test_a_scheduler_is_refused_before_any_weights_load(refusal, name: str) -> None:
    arguments, words = REFUSED_SCHEDULERS[name]
    message = refusal(
        {"model.lr_scheduler": {"class_path": f"torch.optim.lr_scheduler.{name}", "init_args": arguments}}
    )
    assert re.search(words, message, re.DOTALL), message


def test_a_schedule_over_a_run_without_end_is_refused(refusal) -> None:
    endless = {"trainer.max_steps": -1, "trainer.max_time": "00:00:10:00", "model.lr_scheduler": "WarmupCosine"}
    message = refusal(endless)
    assert re.search(r"model\.lr_scheduler\.total_steps: WarmupCosine .*trainer\.max_steps", message, re.DOTALL), (
        message
    )


@pytest.mark.parametrize(("epochs", "steps"), [(2, -1), (2, 5), (2, 50), (-1, 5), (1, 4)])
def test_the_length_of_the_run_is_that_of_the_run(pair, tmp_path, epochs: int, steps: int) -> None:
    """Three optimiser steps a batch, two batches an epoch."""

    class Ask(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            length = run_length(trainer, pl_module.source)
            self.known = {pl_module.total_steps(), int(length.steps)}

    ask = Ask()
    source = TeacherMixedRollouts(max_new_tokens=2, mini_batch_size=4, inner_epochs=3)
    learner = learner_of(pair, {"long": PolicyGradient(), "single": ReverseKL()}, source)
    trainer = quiet_trainer(tmp_path, max_steps=steps, max_epochs=epochs, callbacks=[ask])
    trainer.fit(learner, ProceduralData(num_train=8, num_validation=4, num_test=2, batch_size=4))
    assert ask.known == {trainer.global_step}
