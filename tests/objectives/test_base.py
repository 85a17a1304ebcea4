"""The contract of objectives: a signature is the declaration, and what is wrong is said before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_distill.objectives import (
    ForwardKL,
    JensenShannon,
    LossTerm,
    NextToken,
    Objective,
    SkewForwardKL,
    check_needs,
    probe,
    sum_over_tokens,
    weighted_sum,
)

FROM_DATASET = {"student_logits", "labels"}


class Returns(Objective):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, student_logits: Tensor) -> LossTerm:
        return self.make(student_logits)


def test_needs_are_the_parameters_of_forward() -> None:
    assert ForwardKL().needs == {"student_logits", "teacher_logits"}
    assert NextToken().needs == {"student_logits", "labels"}


def test_what_a_source_lacks_is_named_with_what_it_has() -> None:
    class Weighted(Objective):
        def forward(self, student_logits: Tensor, advantages: Tensor) -> LossTerm: ...

    with pytest.raises(
        ValueError,
        match=r"^model\.objectives\.pg: Weighted needs `advantages`.*the source X does not.*labels, student_logits",
    ):
        check_needs({"pg": Weighted()}, FROM_DATASET, "model.objectives", "the source X")


def test_a_missing_teacher_is_named_by_its_key() -> None:
    with pytest.raises(
        ValueError, match=r"^model\.objectives\.kd: ForwardKL needs `teacher_logits`.*model\.teacher\.path"
    ):
        check_needs({"kd": ForwardKL()}, FROM_DATASET, "model.objectives", "the source X")


def test_a_misspelt_signal_is_answered_with_the_right_one() -> None:
    class Typo(Objective):
        def forward(self, student_logit: Tensor) -> LossTerm: ...

    with pytest.raises(ValueError, match=r"`student_logit`.*Did you mean `student_logits`"):
        check_needs({"kd": Typo()}, FROM_DATASET, "model.objectives", "the source X")


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_cannot_be_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight: expected a finite number >= 0 for ForwardKL"):
        ForwardKL(weight=weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.sum(), "return LossTerm"),
        (lambda x: LossTerm(x.sum(-1), 3), r"total has shape \[3\]; return the sum"),
        (lambda x: LossTerm(x.sum(), 3, {"m": x.sum(-1)}), r"metrics\['m'\] has shape \[3\]"),
        (lambda x: LossTerm(x.sum(), x.sum(-1)), "count must be an int"),
        (lambda x: LossTerm(x.sum(), 2), "counted 2 of 3 rows"),
    ],
)
def test_what_is_no_loss_term_of_sums_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(Returns(make), 7, "model.objectives.own")


def test_a_count_that_depends_on_values_is_noticed() -> None:
    assert not probe(Returns(lambda x: sum_over_tokens(x.sum(-1))), 7, "k")
    assert probe(Returns(lambda x: LossTerm(x.sum(), (x > 0).any(-1).sum())), 7, "k")


def test_probing_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    probe(Returns(lambda x: sum_over_tokens(torch.dropout(x, 0.5, True).sum(-1))), 7, "k")
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature"),
        (lambda: JensenShannon(beta=0.0), "KL"),
        (lambda: JensenShannon(beta=1.0), "KL"),
        (lambda: SkewForwardKL(skew=1.5), "skew"),
        (lambda: NextToken(label_smoothing=1.0), "label_smoothing"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_the_yaml_is_read(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_objective_that_writes_into_a_signal_is_refused() -> None:
    class Halves(Objective):
        def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> LossTerm:
            teacher_logits /= 2
            return sum_over_tokens((student_logits - teacher_logits).square().sum(dim=-1))

    signals = {"student_logits": torch.randn(3, 5, requires_grad=True), "teacher_logits": torch.randn(3, 5)}
    with pytest.raises(ValueError, match=r"^objectives\.mine: Halves modifies `teacher_logits` in place.*x = x / 2"):
        weighted_sum({"mine": Halves()}, {"mine": 1.0}, signals)
    with torch.inference_mode():
        weighted_sum({"kd": ForwardKL()}, {"kd": 1.0}, {name: torch.randn(3, 5) for name in signals})
