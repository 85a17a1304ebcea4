"""A run without padding learns what a padded run learns, whatever the source of its texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import learner_of, quiet_trainer, weights

from lit_distill.data import ProceduralData
from lit_distill.objectives import (
    DirectPreference,
    ForwardKL,
    JensenShannon,
    NextToken,
    PolicyGradient,
    ReverseKL,
    SkewReverseKL,
)
from lit_distill.sources import (
    DatasetResponses,
    ReplayRollouts,
    ResponsePairs,
    StudentRollouts,
    TeacherMixedRollouts,
    TeacherRollouts,
)
from lit_distill.types import Sequences

KINDS: dict[str, Any] = {
    "dataset": (DatasetResponses, {"kd": ForwardKL, "ce": NextToken, "js": JensenShannon}),
    "student": (lambda: StudentRollouts(max_new_tokens=6), {"kd": ReverseKL}),
    "teacher": (lambda: TeacherRollouts(max_new_tokens=6), {"ce": NextToken}),
    "replay": (lambda: ReplayRollouts(increment=0.0, initial_probability=0.8, max_new_tokens=6), {"kd": SkewReverseKL}),
    "mixed": (
        lambda: TeacherMixedRollouts(max_new_tokens=6, mini_batch_size=3, inner_epochs=2),
        {"long": PolicyGradient, "single": ReverseKL},
    ),
    "pairs": (
        lambda: ResponsePairs(max_new_tokens=6, mini_batch_size=3),
        {"dpkd": DirectPreference},
    ),
}


@pytest.mark.parametrize("turns", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_a_padded_run(pair, tmp_path, monkeypatch, kind: str, turns: int) -> None:
    packed = []
    found = Sequences.packed.func

    def counted(texts: Sequences) -> Any:
        rows = found(texts)
        packed.append(rows is not None)
        return rows

    ends = []
    for padding_free in (True, False):
        source, objectives = KINDS[kind]
        learner = learner_of(
            pair,
            {name: objective() for name, objective in objectives.items()},
            source(),
            lr=0.01,
            padding_free=padding_free,
            micro_batch_size=4,
        )
        data = ProceduralData(
            num_train=24, num_validation=4, num_test=2, batch_size=6, turns=turns, max_prompt_length=200, seed=3
        )
        with monkeypatch.context() as counting:
            counting.setattr(Sequences, "packed", property(counted))
            torch.manual_seed(0)
            quiet_trainer(tmp_path, 3).fit(learner, data)
        ends.append(weights(learner))
    assert any(packed)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
