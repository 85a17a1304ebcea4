"""A source of one's own that yields something else than it told, or what cannot be learnt, is refused by its name."""

from __future__ import annotations

import pytest
from training import learner_of, quiet_trainer

from lit_distill.data import ProceduralData
from lit_distill.objectives import NextToken
from lit_distill.sources import Source
from lit_distill.sources.base import TEXT_SIGNALS


class Odd(Source):
    """Tells so many mini-batches of a batch, and yields others."""

    provides = TEXT_SIGNALS
    reads_prompts = False

    def __init__(self, told: int, found: int, whole: bool = False) -> None:
        self.told, self.found, self.whole = told, found, whole

    def steps_per_batch(self, batch_size: int) -> int:
        return self.told

    def mini_batches(self, batch, context):
        for _ in range(self.found):
            yield batch if self.whole else batch.sequences


def train(pair, folder, source: Source, steps: int = 4) -> int:
    learner = learner_of(pair, {"ce": NextToken()}, source)
    data = ProceduralData(num_train=16, num_validation=4, num_test=4, batch_size=4)
    trainer = quiet_trainer(folder, steps)
    trainer.fit(learner, data)
    return trainer.global_step


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (Odd(2, 1), r"Odd: mini_batches yields 1, but steps_per_batch told 2"),
        (Odd(2, 3), r"Odd: mini_batches yields more than the 2 that steps_per_batch told"),
        (Odd(0, 1), r"Odd: steps_per_batch\(4\) is 0, expected at least 1"),
        (Odd(1, 1, whole=True), r"Odd: mini_batches yields Batch, expected Sequences or Pairs"),
    ],
    ids=["fewer", "more", "none", "a batch"],
)
def test_it_is_refused(pair, tmp_path, source: Odd, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train(pair, tmp_path, source)


def test_a_run_may_end_inside_of_a_batch(pair, tmp_path) -> None:
    assert train(pair, tmp_path, Odd(3, 3)) == 4
