"""A run that goes on with other settings: what takes effect is said, what cannot is refused, and nothing is ignored."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from command_line import run, tiny_config, write
from lightning.pytorch import Callback
from soft_stops import BATCHES, STOPS, Run, data, learner, same

from lit_distill.models import ModelSpec
from lit_distill.objectives import ForwardKL, NextToken, PolicyGradient
from lit_distill.optim import WarmupCosine
from lit_distill.resume.changes import check_changes
from lit_distill.sources import DatasetResponses, ReplayRollouts, Reward, TargetFilter, TeacherMixedRollouts


class Brief(Reward):
    """Minus the characters of a response."""

    def __call__(self, answers):
        return [-float(len(answer.response)) for answer in answers]


def adamw(lr: float = 0.01, **settings):
    return {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, **settings)}


def sgd(lr: float = 0.01, **settings):
    return {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr, **settings)}


def cosine(**settings):
    return {"lr_scheduler": lambda optimizer: WarmupCosine(optimizer, **settings)}


class Rates(Callback):
    """The settings of the optimiser at each step, and its state and the weights at the start."""

    def __init__(self) -> None:
        self.groups: list[list[dict]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.fresh = not trainer.optimizers[0].state
        self.start = torch.cat([p.detach().flatten() for p in pl_module.student.parameters()])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.groups.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])

    @property
    def lr(self) -> list[float]:
        return [groups[0]["lr"] for groups in self.groups]


@pytest.mark.parametrize(("steps", "told"), [(3, True), (2, True), (4, False)])
def test_a_run_with_no_step_left_says_so(pair, tmp_path, said, steps, told) -> None:
    first = Run(learner(pair), tmp_path, max_steps=3)
    second = Run(learner(pair), tmp_path, ckpt_path=first.last, max_steps=steps)
    words = f"trainer.max_steps: {steps}, and the checkpoint has 3 steps already. Nothing is left to train"
    assert any(line.startswith(words) for line in said) is told
    assert torch.equal(first.end()["weights"], second.end()["weights"]) is told


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("lit_distill.resume.state.rank_zero_info", lines.append)
    return lines


def test_another_learning_rate_and_weight_decay_take_effect_at_the_next_step_and_are_said(pair, tmp_path, said) -> None:
    first = Run(learner(pair, **adamw(0.01, weight_decay=0.1)), tmp_path, max_steps=3)
    rates = Rates()
    module = learner(pair, **adamw(0.002, weight_decay=0.3, betas=(0.8, 0.99)))
    Run(module, tmp_path, [rates], ckpt_path=first.last, max_steps=5)
    assert rates.lr == [0.002, 0.002]
    assert [[group["weight_decay"], group["betas"]] for group in rates.groups[0]] == [
        [0.3, (0.8, 0.99)],
        [0.0, (0.8, 0.99)],
    ]
    assert not rates.fresh
    assert sorted(said) == [
        "model.optimizer.betas: [0.9, 0.999] in the checkpoint, [0.8, 0.99] from now on.",
        "model.optimizer.lr: 0.01 in the checkpoint, 0.002 from now on.",
        "model.optimizer.weight_decay: 0.1 in the checkpoint, 0.3 from now on.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({**adamw(0.01), **cosine(total_steps=10)}, {**adamw(0.05), **cosine(total_steps=10)}),
        ({**adamw(0.01), **cosine(total_steps=10)}, {**adamw(0.01), **cosine(total_steps=20, final_ratio=0.1)}),
        ({**adamw(0.01), **cosine()}, {**adamw(0.01), **cosine()}),  # its length is that of the run
    ],
)
def test_a_schedule_of_other_values_goes_on_from_its_step(pair, tmp_path, said, before, after) -> None:
    first = Run(learner(pair, **before), tmp_path, max_steps=4)
    rates, whole = Rates(), Rates()
    Run(learner(pair, **after), tmp_path, [rates], ckpt_path=first.last, max_steps=8)
    Run(learner(pair, **after), tmp_path / "whole", [whole], max_steps=8)
    assert rates.lr == whole.lr[4:]
    assert said
    assert all(line.startswith(("model.optimizer.lr: ", "model.lr_scheduler.")) for line in said)


def test_a_schedule_that_is_no_function_of_the_step_alone_goes_on_too(pair, tmp_path) -> None:
    def settings(lr: float, gamma: float):
        return {
            **sgd(lr),
            "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=gamma),
        }

    first = Run(learner(pair, **settings(0.1, 0.5)), tmp_path, max_steps=3)
    rates = Rates()
    Run(learner(pair, **settings(0.2, 0.1)), tmp_path, [rates], ckpt_path=first.last, max_steps=6)
    assert rates.lr == pytest.approx([0.02, 0.002, 0.002])


def test_the_same_settings_say_nothing_and_change_no_bit(pair, tmp_path, said) -> None:
    settings = {**adamw(0.01), **cosine(warmup_steps=2, total_steps=9)}
    whole = Run(learner(pair, **settings), tmp_path / "whole", max_steps=6)
    first = Run(learner(pair, **settings), tmp_path, max_steps=3)
    second = Run(learner(pair, **settings), tmp_path, ckpt_path=first.last, max_steps=6)
    assert same(second.end(), whole.end())
    assert said == []


def test_what_is_read_anew_takes_effect_without_a_word(pair, tmp_path, said) -> None:
    objectives = {"kd": ForwardKL(), "ce": NextToken(weight=0.5)}
    first = Run(learner(pair, DatasetResponses, objectives), tmp_path, max_steps=2)
    module = learner(pair, DatasetResponses, {"kd": ForwardKL(weight=0.1), "ce": NextToken()}, micro_batch_size=2)
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2}
    second = Run(module, tmp_path, ckpt_path=first.last, items=data(num_workers=1), max_steps=4, **settings)
    assert second.journal.validated == [4]
    assert said == []


def test_other_objectives_take_effect_and_are_named(pair, tmp_path, said) -> None:
    first = Run(learner(pair, DatasetResponses, {"kd": ForwardKL(), "ce": NextToken()}), tmp_path, max_steps=2)
    Run(learner(pair, DatasetResponses, {"kd": ForwardKL()}), tmp_path, ckpt_path=first.last, max_steps=4)
    (line,) = said
    assert line == (
        "model.objectives: kd: ForwardKL, ce: NextToken, lm: NextToken in the checkpoint, "
        "kd: ForwardKL, lm: NextToken from now on."
    )


def test_another_source_reward_or_choice_of_tokens_takes_effect_and_is_named(pair, tmp_path, said) -> None:
    def mixed(*rewards: str) -> TeacherMixedRollouts:
        return TeacherMixedRollouts(
            max_new_tokens=4, mini_batch_size=4, inner_epochs=1, rewards={name: Brief() for name in rewards}
        )

    objectives = {"kd": ForwardKL(), "long": PolicyGradient()}
    first = Run(learner(pair, mixed, objectives), tmp_path, max_steps=2)
    now = {"targets": TargetFilter(first_tokens=3)}
    Run(learner(pair, lambda: mixed("short"), objectives, **now), tmp_path, ckpt_path=first.last, max_steps=4)
    source, targets = said
    said.clear()
    reset = {"reset_optimizer": True}
    Run(
        learner(pair, lambda: mixed("brief"), objectives),
        tmp_path / "reset",
        None,
        first.last,
        checkpoint=reset,
        max_steps=6,
    )
    assert said[0].startswith("model.source: TeacherMixedRollouts in the checkpoint, ")
    assert "a new optimiser" in said[-1]
    assert source == (
        "model.source: TeacherMixedRollouts in the checkpoint, TeacherMixedRollouts with rewards short: Brief from now on."
    )
    assert targets.startswith("model.targets: None in the checkpoint, TargetFilter(first_tokens=3, ")


@pytest.mark.parametrize(
    ("before", "after", "key", "knows"),
    [
        (adamw(), sgd(momentum=0.9), "optimizer", True),
        (sgd(momentum=0.9), adamw(), "optimizer", True),
        (adamw(), {**adamw(), **cosine()}, "lr_scheduler", True),
        (adamw(), sgd(momentum=0.9), "optimizer", False),
        (sgd(momentum=0.9), adamw(), "optimizer", False),
    ],
)
def test_another_class_is_refused_with_the_key_that_starts_it_afresh(
    pair, tmp_path, before, after, key: str, knows: bool
) -> None:
    first = Run(learner(pair, **before), tmp_path, max_steps=2)
    if not knows:  # a checkpoint from before these were compared
        saved = torch.load(first.last, weights_only=True)
        del saved["settings"]
        torch.save(saved, first.last)
    with pytest.raises(ValueError, match=rf"^model\.{key}: the checkpoint.*checkpoint\.reset_optimizer: true"):
        Run(learner(pair, **after), tmp_path, ckpt_path=first.last, max_steps=4)


@pytest.mark.parametrize("weights_only", [False, True])
def test_reset_optimizer_keeps_weights_and_position_and_schedules_what_is_left(
    pair, tmp_path, said, weights_only: bool
) -> None:
    settings = {"save_weights_only": weights_only}
    first = Run(learner(pair, **adamw()), tmp_path, checkpoint=settings, max_steps=3)
    whole = Run(learner(pair, **adamw()), tmp_path / "whole", max_steps=8)
    after = {**sgd(0.2, momentum=0.9), **cosine()}
    rates, reset = Rates(), {"reset_optimizer": True}
    second = Run(learner(pair, **after), tmp_path, [rates], first.last, checkpoint=reset, max_steps=8)
    assert rates.fresh
    assert torch.equal(rates.start, first.end()["weights"])
    assert second.journal.read == whole.journal.read[3:]
    assert rates.lr == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)])
    assert said == ["checkpoint.reset_optimizer: a new optimiser and learning-rate schedule start here."]


def test_reset_optimizer_resets_once_so_that_the_same_command_goes_on_exactly(pair, tmp_path) -> None:
    after, reset = {**sgd(0.2, momentum=0.9), **cosine()}, {"reset_optimizer": True}
    first = Run(learner(pair, **adamw()), tmp_path, max_steps=2)
    start = tmp_path / "start.ckpt"
    shutil.copy(first.last, start)
    whole = Run(learner(pair, **after), tmp_path / "whole", ckpt_path=start, checkpoint=reset, max_steps=8)
    stop = [STOPS["should_stop"](5)]
    second = Run(learner(pair, **after), tmp_path, stop, ckpt_path=start, checkpoint=reset, max_steps=8)
    third = Run(learner(pair, **after), tmp_path, ckpt_path=second.last, checkpoint=reset, max_steps=8)
    assert third.trainer.global_step == 8
    assert same(third.end(), whole.end())
    rates = Rates()
    Run(learner(pair, **adamw()), tmp_path, [rates], third.last, checkpoint=reset, max_steps=9)  # another class again
    assert rates.fresh


def test_weights_without_an_optimizers_state_are_refused_with_the_key_that_takes_them(pair, tmp_path) -> None:
    first = Run(learner(pair), tmp_path, checkpoint={"save_weights_only": True}, max_steps=2)
    with pytest.raises(ValueError, match=r"no optimiser state.*checkpoint\.reset_optimizer: true"):
        Run(learner(pair), tmp_path, ckpt_path=first.last, max_steps=4)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 3)])
def test_batches_of_another_size_read_the_rest_of_the_epoch_once(pair, tmp_path, before: int, after: int) -> None:
    count = 4 * BATCHES  # without a rest in batches of 2 or 4
    first = Run(learner(pair), tmp_path, items=data(num_train=count, batch_size=before), max_steps=3)
    items = data(num_train=count, batch_size=after)
    second = Run(learner(pair), tmp_path, ckpt_path=first.last, items=items, max_epochs=2)
    ids = {0: [], 1: []}
    for epoch, _, batch, _ in first.journal.read + second.journal.read:
        ids[epoch] += batch
    assert len(set(ids[0])) == len(ids[0]) >= count - count % after
    straight = Run(learner(pair), tmp_path / "straight", items=items, max_epochs=2)
    per_epoch = count // after
    assert [read[2] for read in second.journal.read[-per_epoch:]] == [
        read[2] for read in straight.journal.read[-per_epoch:]
    ]
    assert second.journal.read[-1][:2] == (1, per_epoch - 1)


def test_a_teacher_at_another_place_is_the_same_and_another_teacher_is_refused(pair, tmp_path, said) -> None:
    student, teacher = pair
    first = Run(learner(pair, DatasetResponses, {"kd": ForwardKL()}), tmp_path, max_steps=2)
    shutil.copytree(teacher, tmp_path / "moved")
    moved = (student, tmp_path / "moved")
    Run(learner(moved, DatasetResponses, {"kd": ForwardKL()}), tmp_path, ckpt_path=first.last, max_steps=3)
    assert said == []
    with pytest.raises(
        ValueError, match=r"model\.teacher\.path: .* is another model .*model\.student\.path: export/last"
    ):
        Run(
            learner((student, student), DatasetResponses, {"kd": ForwardKL()}),
            tmp_path,
            ckpt_path=first.last,
            max_steps=3,
        )


def test_other_data_are_refused(pair, tmp_path) -> None:
    first = Run(learner(pair), tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"^data: .* trains on 18 items .* this run has 20 items .*export/last"):
        Run(learner(pair), tmp_path, ckpt_path=first.last, items=data(num_train=20), max_steps=3)


def test_another_source_begins_with_nothing_remembered(pair, tmp_path) -> None:
    replay = ReplayRollouts(1.0, increment=0.0, capacity=4, max_new_tokens=4)
    first = Run(learner(pair, lambda: replay), tmp_path, max_steps=1)
    assert replay.texts
    kept = []

    class Other(DatasetResponses):
        def load_state_dict(self, state) -> None:
            kept.append(dict(state))

    Run(learner(pair, Other), tmp_path, ckpt_path=first.last, max_steps=2)
    assert kept == [{}]


def test_the_command_line_refuses_before_anything_loads(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(pair)
    config |= {"generation": {"max_prompts": 0}, "export": {"enabled": False}}
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    config["checkpoint"] = {"monitor": None}
    written = write(config, tmp_path / "c.yaml")
    run("fit", "--config", written)
    log = Path("runs/c/version_0/metrics.csv")
    before = log.read_text()

    def loads(*arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("lit_distill.module.load_models", loads)
    other = ("--model.optimizer", "SGD", "--model.optimizer.lr", "0.1")
    with pytest.raises(ValueError, match=r"^model\.optimizer: .*AdamW.*SGD.*checkpoint\.reset_optimizer: true"):
        run("fit", "--config", written, "--ckpt_path", "last", *other)
    with pytest.raises(ValueError, match=r"^model\.student\.path: "):
        run("fit", "--config", written, "--ckpt_path", "last", "--model.student.path", pair[1])
    assert log.read_text() == before
    with pytest.raises(AssertionError, match="loaded"):
        run("fit", "--config", written, "--ckpt_path", "last", *other, "--checkpoint.reset_optimizer", "true")


def test_other_layers_of_the_same_model_are_refused_by_their_key() -> None:
    settings = {"optimizer": None, "lr_scheduler": None, "data": None, "teacher": None, "reference": None}
    then, now = ({"path": "m", "revision": None, "layers": [None, drop], "content": "c"} for drop in ([1], [2]))
    with pytest.raises(
        ValueError, match=r"model\.student\.keep_layers, drop_layers: \[None, \[2\]\], but the checkpoint's"
    ):
        check_changes({**settings, "student": then}, {**settings, "student": now}, False)


def test_specs_of_one_path_are_told_apart_by_their_layers(pair) -> None:
    from lit_distill.models.identity import identity_of, is_same_model

    whole, half = (identity_of(ModelSpec(str(pair[0]), keep_layers=keep), "model.student") for keep in (None, 1))
    assert is_same_model(whole, dict(whole))
    assert not is_same_model(whole, half)
