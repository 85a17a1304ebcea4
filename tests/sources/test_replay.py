"""DistiLLM's source: when the student speaks, what the buffer keeps, and that a resumed run is the same run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tiny import VOCABULARY
from torch import Tensor

from lit_distill.callbacks import RunCheckpoint
from lit_distill.data import ProceduralData
from lit_distill.generation import Decoder
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import SkewReverseKL
from lit_distill.sources import ReplayRollouts, RolloutContext
from lit_distill.sources.replay import gather_texts
from lit_distill.sources.sampled import _SampledResponses
from lit_distill.types import Batch, Prompts, Sequences

TOTAL = 400


def context(student=None, step: int = 0, rank: int = 0, world_size: int = 1, total=lambda values: values, seen=None):
    show = (lambda _: None) if seen is None else seen.append
    generators = {"student": Decoder(student, (0,))}
    return RolloutContext(student, None, generators, step, lambda: TOTAL, rank, world_size, total, show)


def batch_of(items: range, width: int = 5) -> Batch:
    """Prompts of different lengths and the dataset's responses, a function of the items alone."""
    ids = torch.stack([torch.randint(1, VOCABULARY, (width,), generator=torch.manual_seed(item)) for item in items])
    mask = torch.stack([torch.arange(width) >= item % 3 for item in items]).long()
    text = Sequences(ids, torch.ones_like(ids), torch.ones_like(ids).bool().index_fill(1, torch.tensor([0]), False))
    return Batch(ids=tuple(map(str, items)), prompts=Prompts(ids * mask, mask), sequences=text)


def unpadded(text: Sequences) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of every row, by its masks."""
    rows = zip(text.input_ids, text.attention_mask.bool(), text.target_mask, strict=True)
    return [(ids[seen & ~target].tolist(), ids[target].tolist()) for ids, seen, target in rows]


def held(source: ReplayRollouts) -> list[tuple[list[int], list[int]]]:
    return [(text.ids[: text.prompt_length].tolist(), text.ids[text.prompt_length :].tolist()) for text in source.texts]


@pytest.mark.parametrize("schedule", ["decreasing", "constant", "increasing"])
def test_new_drawn_and_dataset_texts_come_as_often_as_the_paper_says(monkeypatch, schedule: str) -> None:
    source = ReplayRollouts(0.6, capacity=2, replay_schedule=schedule, seed=3)
    source.texts.extend([(torch.ones(3), 1)] * 2)  # full
    monkeypatch.setattr(_SampledResponses, "mini_batches", lambda *_: iter(()))  # new texts
    monkeypatch.setattr(ReplayRollouts, "_sample_buffer", lambda *_: "drawn")
    monkeypatch.setattr(ReplayRollouts, "_other_responses", lambda *_: iter(["dataset"]))
    quarters = torch.zeros(4, 3)
    for seed in range(10):
        source.seed = seed
        for step in range(TOTAL):
            (kind,) = list(source.mini_batches(None, context(step=step))) or ["new"]
            quarters[4 * step // TOTAL, ["new", "drawn", "dataset"].index(kind)] += 1
    middle = torch.tensor([0.125, 0.375, 0.625, 0.875])
    new = 0.6 * {"decreasing": 1 - middle, "constant": torch.full((4,), 0.5), "increasing": middle}[schedule]
    expected = torch.stack([new, 0.6 - new, torch.full((4,), 0.4)], dim=-1)
    torch.testing.assert_close(quarters / quarters.sum(dim=-1, keepdim=True), expected, rtol=0, atol=0.05)


def test_until_the_buffer_is_full_the_student_speaks_with_probability_phi(student) -> None:
    source, seen = ReplayRollouts(1.0, capacity=8, max_new_tokens=2), []
    for step in (TOTAL - 2, TOTAL - 1, TOTAL, TOTAL):  # where the share of new texts is next to nothing
        list(source.mini_batches(batch_of(range(4)), context(student, step, seen=seen)))
    assert len(seen) == 2  # twice four texts; callbacks see them once
    assert source.metrics() == {"replay_probability": 1.0, "buffer_size": 8.0}


def test_the_oldest_texts_give_way_and_what_is_kept_is_what_was_said(student) -> None:
    source, said = ReplayRollouts(1.0, capacity=6, max_new_tokens=7), []
    for step in range(3):
        (text,) = source.mini_batches(batch_of(range(4 * step, 4 * step + 4)), context(student, step))
        said += unpadded(text)
    assert len({len(response) for _, response in said}) > 1
    assert held(source) == said[-6:]


def test_drawn_texts_are_what_was_said_each_at_most_once(student) -> None:
    source = ReplayRollouts(1.0, capacity=8, max_new_tokens=7)
    for step in range(2):
        list(source.mini_batches(batch_of(range(4 * step, 4 * step + 4)), context(student, step)))
    said, draws = held(source), []
    for step in range(TOTAL, TOTAL + 30):
        (text,) = source.mini_batches(batch_of(range(4)), context(step=step))
        texts = unpadded(text)
        assert not text.target_mask[:, 0].any()
        draws.append([said.index(row) for row in texts])
    assert all(len(set(draw)) == 4 for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=8)
    assert counts.min() >= 5  # 15 each on average
    assert held(source) == said


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_hold_the_same_buffer_as_one_and_share_what_they_draw(student, world_size: int) -> None:
    one = ReplayRollouts(1.0, capacity=4, max_new_tokens=6)
    whole = batch_of(range(4))
    (text,) = one.mini_batches(whole, context(student))
    shares = []
    for rank in range(world_size):
        rows = torch.arange(4)[rank::world_size]
        dummy = rows if len(rows) else torch.tensor([0])  # a rank without items has a row that counts nowhere
        share = text.select(dummy)
        if not len(rows):
            share.target_mask.zero_()
        shares.append((share, len(rows)))

    contributions: list[list[Tensor]] = []  # of one rank each, as far as the ranks have come

    def gathered(rank: int) -> list | None:
        """The texts on ``rank``; None where it has to wait for what the others contribute next."""
        reached: list[Tensor] = []

        def total(values: Tensor) -> Tensor:
            reached.append(values.clone())
            if len(reached) > rounds:
                raise StopIteration
            return torch.stack([done[len(reached) - 1] for done in contributions]).sum(dim=0)

        try:
            return gather_texts(*shares[rank], context(rank=rank, world_size=world_size, total=total))
        except StopIteration:
            return None
        finally:
            waiting.append(reached)

    results: list = [None]
    for rounds in range(4):  # noqa: B007 - `total` reads it
        waiting: list[list[Tensor]] = []
        results = [gathered(rank) for rank in range(world_size)]
        contributions = waiting
    for texts in results:
        pairs = [(text.ids[: text.prompt_length].tolist(), text.ids[text.prompt_length :].tolist()) for text in texts]
        assert pairs == held(one)

    (alone,) = one.mini_batches(whole, context(step=TOTAL))
    drawn = []
    for rank, (_, count) in enumerate(shares):
        mine = Batch(whole.ids[:count], whole.prompts)
        (part,) = one.mini_batches(mine, context(None, TOTAL, rank, world_size, lambda _: torch.tensor(4)))
        drawn.append(unpadded(part))
        assert part.target_mask.any() == (count > 0)
    assert [drawn[i % world_size][i // world_size] for i in range(4)] == unpadded(alone)


def test_phi_rises_exactly_when_the_loss_has_risen_by_the_tolerance() -> None:
    source = ReplayRollouts(increment=0.4, tolerance=0.25)
    losses = [2.0, 2.125, 1.0, 2.25, 2.375, 2.5, 9.0, 9.0]
    seen = []
    for loss in losses:
        source.observe_validation({"loss": torch.tensor(loss)})
        seen.append((source.probability, source.reference_loss))
    assert seen == [(0, 2), (0, 2), (0, 2), (0.4, 2.25), (0.4, 2.25), (0.8, 2.5), (1.0, 9), (1.0, 9)]


class KilledError(BaseException):  # after an Exception the run would save its state
    pass


class Kill(L.Callback):
    """Ends the process, as it were, when ``hook`` is called at optimiser step ``step``."""

    def __init__(self, hook: str, step: int) -> None:
        def end(trainer: L.Trainer, *_) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                raise KilledError

        setattr(self, hook, end)


def fit(
    pair, folder: Path, *, kill: Kill | None = None, resume: Path | None = None, source=None, every=None, **settings
):
    """Twelve steps uphill, so that the validation loss rises, and with it φ."""
    learner = DistillationModule(
        ModelSpec(str(pair[0])),
        {"srkl": SkewReverseKL()},
        ModelSpec(str(pair[1])),
        source or ReplayRollouts(0.5, increment=0.07, capacity=8, tolerance=1e-4, max_new_tokens=6, seed=2),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, maximize=True),
    )
    checkpoint = RunCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[checkpoint, *([kill] if kill else [])],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 12, "val_check_interval": 2, "check_val_every_n_epoch": None, **settings},
    )
    data = ProceduralData(num_train=40, num_validation=4, num_test=4, batch_size=4)
    with pytest.raises(KilledError) if kill else nullcontext():
        trainer.fit(learner, data, ckpt_path=resume, weights_only=True)
    return learner


def weights(learner: DistillationModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in learner.student.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "hook", "step", "saved"),
    [
        (None, "on_train_batch_start", 7, 6),  # saved after the validation
        (None, "on_validation_start", 8, 6),  # which had only begun
        (3, "on_validation_start", 10, 9),  # saved between two
        (2, "on_train_batch_start", 7, 6),  # saved before the validation of its step, and again after it
    ],
)
def test_a_run_killed_in_the_middle_and_resumed_is_the_run_that_was_not(
    pair, tmp_path, every: int | None, hook: str, step: int, saved: int
) -> None:
    straight = fit(pair, tmp_path / "straight")
    killed = fit(pair, tmp_path / "parts", kill=Kill(hook, step), every=every)
    assert killed.global_step == step
    last = tmp_path / "parts" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == saved
    resumed = fit(pair, tmp_path / "parts", resume=last, every=every)
    assert resumed.global_step == straight.global_step == 12
    assert torch.equal(weights(resumed), weights(straight))
    assert resumed.source.metrics() == straight.source.metrics()
    assert resumed.source.reference_loss == straight.source.reference_loss
    assert held(resumed.source) == held(straight.source)
    assert straight.source.probability == pytest.approx(0.5 + 4 * 0.07)  # the second validation is not worse enough
    assert len(straight.source.texts) == 8
    for name, value in {"replay_probability": 0.5 + 3 * 0.07, "buffer_size": 8}.items():  # logged before the last one
        assert float(straight.trainer.callback_metrics[f"rollout/{name}"]) == pytest.approx(value)


def test_a_checkpoint_of_before_there_was_a_buffer_still_loads(pair, tmp_path) -> None:
    fit(pair, tmp_path, max_steps=4)
    old = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(old.pop("source")["lengths"]) > 0
    torch.save(old, tmp_path / "old.ckpt")
    assert fit(pair, tmp_path, resume=tmp_path / "old.ckpt").global_step == 12


def test_a_sanity_check_and_a_validation_on_its_own_move_nothing(pair, tmp_path) -> None:
    learner = fit(pair, tmp_path, max_steps=1, num_sanity_val_steps=2, val_check_interval=9)
    assert learner.source.reference_loss is None
    learner.trainer.validate(learner, ProceduralData(num_train=8, num_validation=4, num_test=4), verbose=False)
    assert "val/loss" in learner.trainer.callback_metrics
    assert learner.source.reference_loss is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"initial_probability": 1.5},
            r"^initial_probability: expected a number in \[0, 1\], got 1.5",
        ),
        ({"increment": -0.1}, r"^increment: expected a number in \[0, 1\]"),
        ({"tolerance": -1.0}, r"^tolerance: expected 0 or more nats, got -1.0"),
        ({"capacity": 0}, r"^capacity: expected at least 1"),
        ({"replay_schedule": "cosine"}, r"^replay_schedule: expected decreasing, .* got 'cosine'"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayRollouts(**setting)


def test_runs_that_cannot_move_phi_or_fill_a_batch_are_refused(pair, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no validation\. Set data\.init_args\.validation .* increment: 0"):
        fit(pair, tmp_path, limit_val_batches=0)
    with pytest.raises(ValueError, match=r"^capacity: 3 sequences do not fill a batch of .*batch_size \(4\)"):
        fit(pair, tmp_path, source=ReplayRollouts(capacity=3))
    with pytest.raises(ValueError, match="the run has no end"):
        ReplayRollouts().check_trainer(
            SimpleNamespace(datamodule=None, limit_val_batches=1, max_steps=-1, max_epochs=-1)
        )
    with pytest.raises(ValueError, match=r"^ReplayRollouts has no validation loss"):
        ReplayRollouts().observe_validation({})
    fit(pair, tmp_path, max_steps=1, source=ReplayRollouts(0.5, increment=0.0), limit_val_batches=0)
