"""Preference losses against their papers' formulas in plain Python, their identities and an enumerated toy."""

from __future__ import annotations

import math

import pytest
import torch

from lit_distill.functional import direct_preference_loss, implicit_reward, token_preference_loss, unrepeated_length

VARIANTS = ["dpkd", "ipo", "cpo", "simpo", "dpop", "reference_free", "teacher_margin"]
SETTINGS = [
    (variant, length_normalize, smoothing)
    for variant in VARIANTS
    for length_normalize in (True, False)
    for smoothing in (0.0, 0.2)
    if (variant != "simpo" or length_normalize) and (variant != "ipo" or not smoothing)  # these are refused, see below
]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def pairs():
    """Log-probabilities of 5 pairs: student chosen, student rejected, teacher chosen, teacher rejected, two lengths."""
    generator = torch.Generator().manual_seed(0)
    logprobs = [-10 * torch.rand(5, generator=generator, dtype=torch.float64) - 1 for _ in range(4)]
    lengths = [torch.randint(1, 9, (5,), generator=generator) for _ in range(2)]
    return (*logprobs, *lengths)


def slow_loss(q_t, q_s, p_t, p_s, n_t, n_s, *, variant, beta, length_normalize, smoothing):
    """Each paper's formula for one pair, with the defaults γ = 0.5, λ = 50 (DPOP) and 1 (CPO), α = 0.1."""
    if not length_normalize:
        n_t = n_s = 1
    q_t, q_s, p_t, p_s = q_t / n_t, q_s / n_s, p_t / n_t, p_s / n_s
    if variant == "ipo":
        return ((q_t - p_t) - (q_s - p_s) - 1 / (2 * beta)) ** 2
    margin = {
        "dpkd": beta * (q_t - p_t) - beta * (q_s - p_s),
        "cpo": beta * q_t - beta * q_s,
        "simpo": beta * q_t - beta * q_s - 0.5,
        "dpop": beta * ((q_t - p_t) - (q_s - p_s) - 50 * max(0, p_t - q_t)),
        "reference_free": beta * q_t - beta * q_s,
        "teacher_margin": beta * (q_t - q_s) - 0.1 * max(0, p_t - p_s),
    }[variant]
    loss = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))
    return loss - q_t if variant == "cpo" else loss


@pytest.mark.parametrize(("variant", "length_normalize", "smoothing"), SETTINGS)
def test_each_variant_is_its_papers_formula(variant, length_normalize, smoothing, pairs):
    options = {"variant": variant, "beta": 0.3, "length_normalize": length_normalize}
    losses = direct_preference_loss(*pairs, label_smoothing=smoothing, **options)
    expected = [
        slow_loss(*row, smoothing=smoothing, **options) for row in zip(*(x.tolist() for x in pairs), strict=True)
    ]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_every_loss_falls_as_the_student_prefers_the_chosen_text(pairs):
    chosen, rejected = (x.clone().requires_grad_() for x in pairs[:2])
    for variant in VARIANTS:
        beta = 0.01 if variant == "ipo" else 0.1  # ipo falls only up to 1/(2 beta), out of reach here
        loss = direct_preference_loss(chosen, rejected, *pairs[2:], beta=beta, variant=variant)
        for_chosen, for_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert (for_chosen < 0).all()
        assert (for_rejected > 0).all()


def test_dpkds_gradient_weight_is_the_probability_of_the_wrong_preference(pairs):
    chosen = pairs[0].clone().requires_grad_()
    loss = direct_preference_loss(chosen, *pairs[1:], beta=0.7)
    (grad,) = torch.autograd.grad(loss.sum(), chosen)
    reward_t = implicit_reward(pairs[0], pairs[2], pairs[4], 0.7)
    reward_s = implicit_reward(pairs[1], pairs[3], pairs[5], 0.7)
    torch.testing.assert_close(grad, -0.7 / pairs[4] * torch.sigmoid(reward_s - reward_t))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_a_student_equal_to_its_teacher_pays_log_two_or_one_over_four_beta_squared(beta, pairs):
    chosen, rejected, _, _, *lengths = pairs
    same = chosen, rejected, chosen, rejected, *lengths
    for variant, expected in (("dpkd", math.log(2)), ("dpop", math.log(2)), ("ipo", 1 / (4 * beta**2))):
        losses = direct_preference_loss(*same, beta=beta, variant=variant)
        torch.testing.assert_close(losses, torch.full_like(losses, expected))


def test_swapping_the_texts_changes_dpkd_by_beta_times_the_difference(pairs):
    q_t, q_s, p_t, p_s, n_t, n_s = pairs
    difference = (q_t - p_t) / n_t - (q_s - p_s) / n_s
    swapped = direct_preference_loss(q_s, q_t, p_s, p_t, n_s, n_t, beta=0.3)
    torch.testing.assert_close(direct_preference_loss(*pairs, beta=0.3) - swapped, -0.3 * difference)


def test_the_mean_gradient_over_all_pairs_of_texts_vanishes_at_the_teacher_and_follows_enumeration_elsewhere():
    """One table over 4 texts; chosen is drawn from the teacher p, rejected from the student q as it was."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    one = torch.ones(16, dtype=torch.long)
    t, s = (x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))

    def mean_gradient(table, variant="dpkd"):
        table = table.clone().requires_grad_()
        log_q, log_p = table.log_softmax(0), teacher.log_softmax(0)
        losses = direct_preference_loss(
            log_q[t], log_q[s], log_p[t], log_p[s], one, one, beta=0.5, variant=variant, teacher_margin=0.5
        )
        law = (log_p[t] + log_q[s].detach()).exp()
        return torch.autograd.grad((law * losses).sum(), table)[0]

    torch.testing.assert_close(mean_gradient(teacher), torch.zeros(4, dtype=torch.float64))
    flatter = mean_gradient(teacher, "teacher_margin")  # the teacher's favourite loses, its last text gains
    assert flatter[teacher.argmax()] > 1e-3 > -1e-3 > flatter[teacher.argmin()]
    q, p = student.softmax(0).tolist(), teacher.softmax(0).tolist()
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):  # d(log q_i - log q_j)/d table = e_i - e_j
            wrong = sigmoid(-0.5 * (math.log(q[i] / p[i]) - math.log(q[j] / p[j])))
            expected[i] -= p[i] * q[j] * 0.5 * wrong
            expected[j] += p[i] * q[j] * 0.5 * wrong
    torch.testing.assert_close(mean_gradient(student), expected)


def test_the_teachers_margin_with_alpha_equal_to_beta_is_dpkd_where_the_teacher_prefers_the_chosen_text(pairs):
    _, _, p_t, p_s, n_t, n_s = pairs
    prefers = p_t / n_t > p_s / n_s
    assert 0 < prefers.sum() < 5
    losses = direct_preference_loss(*pairs, beta=0.3, variant="teacher_margin", teacher_margin=0.3)
    torch.testing.assert_close(losses[prefers], direct_preference_loss(*pairs, beta=0.3)[prefers])
    plain = direct_preference_loss(*pairs, beta=0.3, variant="reference_free")
    torch.testing.assert_close(losses[~prefers], plain[~prefers])  # no margin


def test_the_teachers_margin_grows_with_alpha_and_is_used_by_its_variant_only(pairs):
    q_t, q_s, p_t, p_s, n_t, n_s = pairs
    ordered = q_t, q_s, torch.maximum(p_t / n_t, p_s / n_s) * n_t, torch.minimum(p_t / n_t, p_s / n_s) * n_s, n_t, n_s
    none, some, more = (
        direct_preference_loss(*ordered, variant="teacher_margin", teacher_margin=alpha) for alpha in (0.0, 0.1, 0.4)
    )
    torch.testing.assert_close(none, direct_preference_loss(*ordered, variant="reference_free"))
    assert ((none < some) & (some < more)).all()
    for variant in VARIANTS[:-1]:
        losses = [direct_preference_loss(*pairs, variant=variant, teacher_margin=alpha) for alpha in (0.1, 0.4)]
        assert torch.equal(*losses)


@pytest.mark.parametrize("variant", ["cpo", "simpo", "reference_free"])
def test_variants_without_a_teacher_do_not_read_it(variant, pairs):
    q_t, q_s, p_t, p_s, n_t, n_s = pairs
    unknown = torch.full_like(p_t, math.nan)
    assert torch.equal(
        direct_preference_loss(q_t, q_s, unknown, unknown, n_t, n_s, variant=variant),
        direct_preference_loss(q_t, q_s, p_t, p_s, n_t, n_s, variant=variant),
    )


def test_no_gradient_reaches_the_teacher(pairs):
    for variant in ("dpkd", "teacher_margin"):
        q_t, q_s, p_t, p_s, n_t, n_s = (x.clone().requires_grad_() if x.is_floating_point() else x for x in pairs)
        direct_preference_loss(q_t, q_s, p_t, p_s, n_t, n_s, variant=variant).sum().backward()
        assert p_t.grad is p_s.grad is None
    student, teacher = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    token_preference_loss(student, teacher, variant="dpop").sum().backward()
    assert teacher.grad is None


def test_lost_texts_give_large_finite_gradients(pairs):
    chosen = torch.full_like(pairs[0], -1e6).requires_grad_()
    loss = direct_preference_loss(chosen, *pairs[1:], beta=1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    torch.testing.assert_close(chosen.grad, -1.0 / pairs[4].double())


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(3, 6, 5, generator=generator) for _ in range(2))


def test_token_preference_is_at_least_log_two_with_equality_iff_the_favourites_agree(logits):
    student, teacher = logits
    losses = token_preference_loss(student, teacher, beta=0.4)
    agree = student.argmax(-1) == teacher.argmax(-1)
    assert agree.any()
    assert not agree.all()
    torch.testing.assert_close(losses[agree], torch.full_like(losses[agree], math.log(2)))
    assert (losses[~agree] > math.log(2) + 1e-4).all()


def test_token_preference_is_the_sequence_loss_of_one_token_texts(logits):
    student, teacher = (x.log_softmax(-1) for x in logits)
    favourite, rival = teacher.argmax(-1, keepdim=True), student.argmax(-1, keepdim=True)
    texts = [x.gather(-1, y).flatten() for x in (student, teacher) for y in (favourite, rival)]
    one = torch.ones(18)
    for variant in ("dpkd", "ipo", "reference_free"):
        expected = direct_preference_loss(*texts, one, one, beta=0.4, variant=variant)
        losses = token_preference_loss(*logits, beta=0.4, variant=variant)
        torch.testing.assert_close(losses.flatten(), expected)


def test_dpo_is_another_name_of_the_token_level_dpkd(logits):
    assert torch.equal(token_preference_loss(*logits, variant="dpo"), token_preference_loss(*logits, variant="dpkd"))


def test_simpo_divides_by_the_length_of_the_students_favourite_text_in_units_of_256(logits):
    student, teacher = logits
    student[1, 2:, 3] = 20.0  # the second text ends in a repetition of token 3 from position 2 or before
    plain = token_preference_loss(student, teacher, variant="dpkd")
    lengths = unrepeated_length(student.argmax(-1))
    assert lengths[1] <= 2
    expected = plain * 256 / lengths[:, None]
    torch.testing.assert_close(token_preference_loss(student, teacher, variant="simpo"), expected)
    rows = student.flatten(0, 1), teacher.flatten(0, 1)
    in_rows = token_preference_loss(*rows, variant="simpo", lengths=lengths.repeat_interleave(6))
    torch.testing.assert_close(in_rows, expected.flatten())


def test_the_unrepeated_length_stops_before_the_last_run():
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 3], [1, 2, 2, 2], [1, 1, 2, 1], [5, 5, 5, 5]])
    assert unrepeated_length(tokens).tolist() == [3, 2, 1, 3, 1]
    assert unrepeated_length(tokens[:, :1]).tolist() == [1] * 5


@pytest.mark.parametrize("variant", ["dpkd", "ipo", "dpop", "reference_free"])
def test_masked_and_half_precision_logits_make_no_nan(variant, logits):
    student, teacher = (x.bfloat16() for x in logits)
    student[..., 1] = teacher[..., 1] = -math.inf
    student.requires_grad_()
    losses = token_preference_loss(student, teacher, variant=variant)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_favourite_that_the_student_cannot_say_costs_infinity_with_a_finite_gradient():
    student = torch.tensor([[-math.inf, 0.0, 1.0]]).requires_grad_()
    loss = token_preference_loss(student, torch.tensor([[3.0, 0.0, 1.0]]))
    loss.sum().backward()
    assert loss.item() == math.inf
    assert student.grad.isfinite().all()


TEXT = (torch.zeros(2),) * 4 + (torch.ones(2),) * 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: direct_preference_loss(*TEXT, variant="dpo"), "variant: expected one of dpkd, ipo, .*'dpo'"),
        (lambda: direct_preference_loss(*TEXT, beta=0), "beta: .*0"),
        (lambda: direct_preference_loss(*TEXT, label_smoothing=0.7), "label_smoothing: .*0.7"),
        (
            lambda: direct_preference_loss(*TEXT, variant="teacher_margin", teacher_margin=-0.1),
            "teacher_margin: .*-0.1",
        ),
        (
            lambda: direct_preference_loss(*TEXT, variant="ipo", label_smoothing=0.1),
            "label_smoothing: expected 0 for variant ipo",
        ),
        (lambda: direct_preference_loss(*TEXT, variant="simpo", length_normalize=False), "length_normalize: simpo"),
        (lambda: direct_preference_loss(torch.zeros(3), *TEXT[1:]), r"student_chosen \[3\]"),
        (lambda: token_preference_loss(*TEXT[:2], variant="cpo"), "variant: .*'cpo'"),
        (lambda: token_preference_loss(*TEXT[:2], variant="simpo"), "variant: simpo .*lengths"),
        (lambda: token_preference_loss(torch.zeros(2, 3), torch.zeros(2, 4)), "student scores 3 .* teacher 4"),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
