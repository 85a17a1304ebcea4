r"""Which responses are correct: the last number or letter that a text commits to, in the many ways in which models write one."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from lit_distill.evaluation.checkers import Checker, ChoiceMatch, ExactMatch, NumberMatch, score_of
from lit_distill.evaluation.final_choice import final_choice
from lit_distill.evaluation.final_number import final_number
from lit_distill.evaluation.latex import boxes, without_latex
from lit_distill.types import ArgumentError

NUMBERS: dict[str, str | None] = {  # text -> the value as a fraction
    # how it is written
    "42": "42",
    "42.": "42",
    "It is 42!": "42",
    "-7": "-7",
    "+7": "7",
    "\u22127 degrees": "-7",
    "x=-7": "-7",
    "(-7)": "-7",
    "3.140": "157/50",
    ".5": "1/2",
    "-.5": "-1/2",
    "1,234,567.5": "2469135/2",
    "1{,}234": "1234",
    r"1\,234\,567": "1234567",
    r"10,\!236": "10236",
    "1\u202f234": "1234",
    "1,2,3": "3",  # a list
    "12,34": "34",
    "$18": "18",
    "-$18": "-18",
    "$-18": "-18",
    r"\$18.50": "37/2",
    "US$ 1,000": "1000",
    "€5": "5",
    "USD 20": "20",
    "Rs.500": "500",
    "3/4": "3/4",
    "-3/4": "-3/4",
    "3 / 4 cups": "3/4",
    "2 1/2 cups": "5/2",
    "-2 1/2": "-5/2",
    "in 2020 3/2": "3/2",  # 3/2 is no part of a mixed number
    r"\frac{3}{4}": "3/4",
    r"-\dfrac{3}{4}": "-3/4",
    r"2\frac{1}{2}": "5/2",
    r"\frac12": "1/2",
    "50%": "50",
    r"12.5\%": "25/2",
    "50 percent": "50",
    "1.5e3": "1500",
    "1.5E-2": "3/200",
    "2 x 10^3": "2000",
    r"2.5 \times 10^{-3}": "1/400",
    "1.2 \u00d7 10³": "1200",
    "10^6": "1000000",
    "2^{10}": "1024",
    "-2^2": "-4",
    "5kg": "5",
    "the 3rd": "3",
    r"90^\circ": "90",
    r"18 \text{ dollars}": "18",
    "**42**": "42",
    "$42$": "42",
    # what is none
    "": None,
    "forty-two": None,
    "x2": None,
    "H2O": None,
    "3/0": None,
    "2π": None,
    r"2\pi": None,
    r"2\sqrt{3}": None,
    r"\sqrt{16}": None,
    r"\frac{\pi}{4}": None,
    "2^n": None,
    "12/25/2020": None,
    "9" * 5000: None,
    "1e999999999": None,
    # a range or a difference is no negative number
    "3-5": "5",
    "3\u20135 days": "5",
    "10-4": "4",
    "- 5 apples": "5",  # an item of a list
}


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_read_however_it_is_written(text: str) -> None:
    found, wanted = final_number(text), NUMBERS[text]
    assert (found and found.value) == (wanted and Fraction(wanted))


PLACES: dict[str, str | None] = {
    # the last number, unless a text says where its answer is
    "First 3, then 4, so 7": "7",
    r"\boxed{5}, of 10": "5",
    r"\boxed{5} no, \boxed{6}": "6",
    r"The answer is 7. \boxed{8}": "8",
    r"#### 7 \boxed{8}": "8",
    r"\boxed{\frac{1}{2}}": "1/2",
    r"\boxed{x = 5}": "5",
    r"\boxed{\text{18 apples}}": "18",
    r"\boxed{\text{none}} but 5": None,
    r"\boxed{}": None,
    r"\boxed{3, 4}": None,  # which one?
    r"\boxed{2\sqrt{3}}": None,
    r"\boxed{x+1}": None,
    r"\boxed{1 - x}": None,
    r"\boxed{y = x - 1}": None,
    r"\boxed{-1}": "-1",
    r"\boxed{5-year plan}": "5",
    r"so \boxed{4": "4",  # cut off: no box
    "24 * 3 = <<24*3=72>>72\n#### 72": "72",
    "#### 72 apples": "72",
    "#### $72\nof 100": "72",
    "#### 7\n#### 8": "8",
    "#### 1. Read\nWe have 3.\n#### 2. Add\nIt makes 9": "9",  # headings
    "#### Step 2\nThe answer is 9, not 4": "9",
    "The answer is 7, since 3 + 4 = 7 and not 8": "7",
    "the answer is: **7** of 8": "7",
    "Answer: 7 (of 8)": "7",
    "**Answer:** 7\nThat took 2 steps.": "7",
    "ANSWER = 7, I think, or 8": "7",
    "The answer to question 3 is 7 and not 8": "7",
    "The answer is 5. No: the answer is 6. I am 90% sure.": "6",
    "The answer is 12 + 3 = 15 apples": "15",
    "The answer is 12 apples + 3 apples = 15 apples, of 20": "15",
    "The answer is 2 x 3 = 6 of 9": "6",
    "The answer is 12 -5 = 7.": "7",
    "The answer is 15 = 12 + 3": "15",
    "The answer is 12 + 3 = 15 = 10 + 5": "15",
    "The answer is 5 (since 10 = 2 * 5)": "5",
    "Answer: Tom has 12. He gets 3 more. He has 15.": "15",  # the heading of a solution
    "Answer: Tom has 12 and 3, so 15.\n\nQuestion: Ann has 4": "15",
    "Answer: let me see.\n\n3 + 4\n\n= 7": "7",
    "The answer is unknown.\n\n5": None,
    "3 + 4 = 7, so the answer is": None,  # cut off
    "An answering machine with 7 buttons": "7",
}


@pytest.mark.parametrize("text", PLACES)
def test_the_final_number_is_the_one_that_the_text_commits_to(text: str) -> None:
    found, wanted = final_number(text), PLACES[text]
    assert (found and found.value) == (wanted and Fraction(wanted))


@pytest.mark.parametrize(
    ("response", "references", "correct"),
    [
        ("so 1250", ["1,250"], True),
        ("$1,250.00", ["1250"], True),
        ("so 1251", ["1,250"], False),
        ("so -1250", ["1250"], False),
        ("so 0.1", ["1/10"], True),  # exact: no float equals a tenth
        ("so 0.333", ["1/3"], False),
        ("so 7", ["3 + 4 = <<3+4=7>>7\n#### 7"], True),
        ("so 7", ["8", "7"], True),
        ("I do not know", ["7"], False),
        ("", ["7"], False),
        ("50%", ["50"], True),
        ("50", ["50%"], True),
        ("0.5", ["50%"], True),
        ("50%", ["0.5"], True),
        ("50%", ["5000%"], False),
        ("0.5", ["50"], False),
        ("9" * 5000, ["9"], False),
    ],
)
def test_numbers_are_compared_by_value(response: str, references: list[str], correct: bool) -> None:
    assert NumberMatch()(response, references) == correct


@pytest.mark.parametrize(
    ("response", "reference", "tolerance", "correct"),
    [
        ("3.14", "3.15", 0.01, True),  # of 3.15
        ("0.31", "0.32", 0.01, True),  # below 1: the difference itself
        ("0.31", "0.33", 0.01, False),
        ("990", "1000", 0.01, True),
        ("989", "1000", 0.01, False),
        ("0.333333", "1/3", 1e-6, True),
        ("0.3", "0", 0.3, True),
        ("-0.3", "0", 0.3, True),
        ("49.9%", "0.5", 0.001, True),
    ],
)
def test_a_tolerance_is_a_share_of_the_reference(response, reference, tolerance, correct) -> None:
    assert NumberMatch(tolerance)(response, [reference]) == correct


def test_a_reference_without_a_number_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"^NumberMatch: the reference 'a fox' has no number") as raised:
        score_of(checker := NumberMatch(), "7", ["7", "a fox"])
    assert raised.value.owner is checker


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_cannot_be_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"^tolerance: expected a finite number, at least 0"):
        NumberMatch(tolerance)


CHOICES: dict[str, str | None] = {
    # how it is written
    "B": "B",
    "b": "B",  # nothing else
    "(B)": "B",
    "(b).": "B",
    "B.": "B",
    "B) Rome": "B",
    "B. Rome": "B",
    "- B: Rome": "B",
    "**B**": "B",
    "**B. Rome**": "B",
    r"\boxed{B}": "B",
    r"$\boxed{b}$.": "B",
    r"\boxed{\text{(C)}}": "C",
    r"\boxed{\boxed{B}} or A": "B",
    r"\textbf{(B)}\ 42": "B",
    "I think it is C.": "C",
    "D, I think": "D",
    # statements
    "The answer is B": "B",
    "the answer is (b).": "B",
    "The answer is: **(B)** Rome": "B",
    "Answer:\n\nB": "B",
    "**Answer**: (B)": "B",
    r"So the final answer is $\text{D}$.": "D",
    "The correct option is **C. Berlin**": "C",
    "the answer to question 3 is D": "D",
    "The best choice would be D": "D",
    "I choose option D": "D",
    "I'd go with (E).": "E",
    "(B) is correct": "B",
    "Option C is the best answer": "C",
    # which of several
    "The answer is B, since (A) is wrong": "B",
    "The answer is B, A is wrong": "B",
    "The answer is A. No, the answer is B": "B",
    r"\boxed{A} Wait: the answer is B": "B",
    r"The answer is B. \boxed{A}": "A",
    "(A) is wrong, and (B) is right": "B",
    "A is wrong. Final answer: C": "C",
    "The answer is not A, it is B": "B",
    "A, B and C are wrong, so D": "D",
    "At first (A), then (C)": "C",
    "(C), unlike D": "C",  # a marked letter counts more
    "The answer is C.\n\nQuestion: what is A?": "C",
    "The answer is A or B": None,
    "Answer: A, B": None,
    # the options of the question
    "(A) Paris\n(B) Rome\n(C) Berlin\n(D) Madrid": None,
    "(A) 1\n(B) 2\n(C) 3\n(D) 4\n(E) 5": None,
    "(A) Paris\n(B) Rome\n(C) Berlin\n(D) Madrid\nB": "B",
    "A. Paris\nB. Rome\nC. Berlin\nThe capital is B": "B",
    "Options: (A) x (B) y (C) z. It must be (B)": "B",
    # the article
    "A dog barks": None,
    "A dog barks. So it is B": "B",
    "It is late.\nA dog barks": None,
    "Answer: A dog": None,
    "the answer is a dog": None,
    "a cat": None,
    "A": "A",
    "A. Paris": "A",
    "the answer is a": "A",
    "the answer is a.": "A",
    "The answer is A because dogs bark": "A",
    "Answer: A because dogs bark": "A",
    "So A is correct.": "A",
    "A is what I take": "A",
    # letters that are no choice
    "": None,
    " \n ": None,
    "F": None,
    "it is b": None,
    "The U.S.A. is big": None,
    "20 °C": None,
    "C++": None,
    "A's claim": None,
    "vitamin B-12": None,
    "A + B = 5": None,
    "the event P(A)": None,
    "Because": None,
}


@pytest.mark.parametrize("text", CHOICES)
def test_the_choice_is_the_letter_that_the_text_commits_to(text: str) -> None:
    assert final_choice(text, "ABCDE") == CHOICES[text]


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("The answer is D", "ABC", None),
        ("I think it is J", "ABCDEFGHIJ", "J"),
        ("I think so", "ABCDEFGHIJ", None),  # the pronoun
        ("I", "ABCDEFGHIJ", "I"),
        ("The answer is I.", "ABCDEFGHIJ", "I"),
        ("(A) yes (B) no", "AB", None),  # all of two options
        ("Y", "YN", "Y"),
    ],
)
def test_choices_are_the_letters_that_were_given(text: str, choices: str, letter: str | None) -> None:
    assert final_choice(text, choices) == letter


def test_a_choice_is_compared_with_every_reference_and_one_without_a_letter_is_named() -> None:
    checker = ChoiceMatch("abcd")
    assert checker("the answer is B", ["C", "(B) Rome"]) == 1
    assert checker("the answer is B", ["c"]) == 0
    assert checker("no idea", ["C"]) == 0
    with pytest.raises(ArgumentError, match=r"^ChoiceMatch: the reference 'Rome' chooses none of the letters ABCD\.$"):
        score_of(checker, "B", ["Rome"])


@pytest.mark.parametrize("choices", ["", "A", "AA", "aA", "A1", "A B", "ÄB"])
def test_choices_that_cannot_be_are_refused(choices: str) -> None:
    with pytest.raises(ValueError, match=r"^choices: expected two or more different letters, such as ABCD, got "):
        ChoiceMatch(choices)


def test_exact_match_is_that_of_the_metric() -> None:
    assert ExactMatch()("The cat!", ["a dog", "the cat"]) == 1
    assert ExactMatch()("cat", ["the cat"]) == 0


def test_boxes_are_read_with_their_braces_and_only_if_they_are_closed() -> None:
    text = r"\boxed{\frac{1}{2}} {x} \boxed {a\}b} \boxed{\boxed{in} out} \boxed{cut"
    assert [content for *_, content in boxes(text)] == [r"\frac{1}{2}", r"a\}b", "in", r"\boxed{in} out"]
    start, end, _ = boxes(text)[1]
    assert text[start:end] == r"\boxed {a\}b}"


def test_latex_is_removed_around_what_it_says() -> None:
    assert without_latex(r"\mathbf{\text{(B)}}\ \$5\% \left(\tfrac{1}{2}\right)") == "(B) $5% (1/2)"


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan")])
def test_a_score_outside_of_0_to_1_is_refused(score: float) -> None:
    class Mine(Checker):
        def __call__(self, response, references) -> float:
            return score

    with pytest.raises(ArgumentError, match=r"^Mine must return a score in \[0, 1\], but returned .* 'text' .*\['a'\]"):
        score_of(Mine(), "text", ["a"])


def test_a_part_of_the_score_is_kept() -> None:
    class Half(Checker):
        def __call__(self, response, references) -> float:
            return 0.5

    assert score_of(Half(), "text", ["a"]) == 0.5


@pytest.mark.parametrize(
    "again",
    [
        "9",
        "1,",
        "111,",
        " ",
        "\n",
        "\\frac{",
        "\\boxed{",
        "\\boxed{}",
        "{",
        "answer ",
        "answer is ",
        "A. ",
        "**",
        "3 1/",
    ],
)
def test_a_model_that_repeats_itself_costs_no_time(again: str) -> None:
    text = again * (20_000 // len(again))
    begin = time.process_time()
    final_number(text)
    final_choice(text, "ABCDE")
    assert time.process_time() - begin < 2
