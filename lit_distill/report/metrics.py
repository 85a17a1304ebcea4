"""What the metrics of a test are called, in which unit they are read, and which way is better."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

PREDICTED, WRITTEN, SAMPLED, CONFIDENCE, DRIFT, JUDGED, OTHER = (
    "Predicting held-out responses",
    "Writing responses",
    "Sampling several responses",
    "Calibration of next tokens",
    "Exposure bias",
    "Judge",
    "Objectives and other metrics",
)
NOTHING = "\N{EN DASH}"
"""Stands where there is no metric."""


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    label: str
    group: str
    unit: str = ""
    better: str = ""
    """``lower``, ``higher``, or nothing where neither is."""
    decimals: int = 3
    scale: float = 1.0
    """From the logged number to the unit."""

    @property
    def head(self) -> str:
        """The label with its unit and a sign for which way is better."""
        head = f"{self.label}, {self.unit}" if self.unit else self.label
        return f"{head} {ARROWS[self.better]}".rstrip()


ARROWS = {"lower": "↓", "higher": "↑", "": ""}
KNOWN = {
    "perplexity": Metric("perplexity", PREDICTED, better="lower"),
    "forward_kl": Metric("KL(teacher ‖ student)", PREDICTED, "nats/token", "lower"),
    "reverse_kl": Metric("KL(student ‖ teacher)", PREDICTED, "nats/token", "lower"),
    "top1_agreement": Metric("same first choice as the teacher", PREDICTED, "%", "higher", 1, 100),
    "rouge_l": Metric("ROUGE-L", WRITTEN, "%", "higher", 1),
    "exact_match": Metric("exact match", WRITTEN, "%", "higher", 1),
    "answer_accuracy": Metric("correct answers", WRITTEN, "%", "higher", 1),
    "response_length": Metric("length", WRITTEN, "tokens", "", 1),
    "unfinished": Metric("cut off", WRITTEN, "% of responses", "lower", 1, 100),
    "distinct": Metric("distinct-{}", WRITTEN, "%", "higher", 1, 100),
    "repetition": Metric("repeated runs of {} words", WRITTEN, "%", "lower", 1, 100),
    "pass_at": Metric("pass@{}", SAMPLED, "%", "higher", 1),
    "mean_at": Metric("mean score of {} responses", SAMPLED, "%", "higher", 1),
    "sampled_length": Metric("length of samples", SAMPLED, "tokens", "", 1),
    "sampled_unfinished": Metric("samples cut off", SAMPLED, "%", "lower", 1, 100),
    "top_k_overlap": Metric("top tokens in common with the teacher", SAMPLED, "%", "higher", 1, 100),
    "on_policy_reverse_kl": Metric("KL(student ‖ teacher) on own samples", SAMPLED, "nats/token", "lower"),
    "on_policy_student_entropy": Metric("entropy of the student", SAMPLED, "nats/token"),
    "on_policy_teacher_entropy": Metric("entropy of the teacher", SAMPLED, "nats/token"),
    "reward": Metric("reward of rollouts", SAMPLED, "nats/token", "higher"),
    "accuracy": Metric("accuracy", CONFIDENCE, "%", "higher", 1, 100),
    "ece": Metric("ECE, equal widths", CONFIDENCE, "", "lower"),
    "adaptive_ece": Metric("ECE, equal masses", CONFIDENCE, "", "lower"),
    "brier": Metric("Brier score", CONFIDENCE, "0 to 2", "lower"),
    "mass": Metric("probability of all label words", CONFIDENCE, "%", "higher", 1, 100),
    "ex_acc_err": Metric("ExAccErr at {} tokens", DRIFT, "%", "lower", 1),
    "judge_ratio": Metric("score over the reference's", JUDGED, "%", "higher", 1),
    "judge_student": Metric("score", JUDGED, "1 to 10", "higher", 2),
    "judge_reference": Metric("score of the references", JUDGED, "1 to 10", "", 2),
    "judge_count": Metric("responses judged", JUDGED, "", "", 0),
    "loss": Metric("loss: weighted sum of the objectives", OTHER, "", "lower"),
}
ORDER = list(KNOWN)
GROUPS = (PREDICTED, WRITTEN, SAMPLED, CONFIDENCE, DRIFT, JUDGED)


def metric_of(name: str) -> Metric:
    """How to show the metric ``name``; any name has an answer.

    ``<task>/ece`` is of a group of its own, named after the task.
    """
    task, _, last = name.rpartition("/")
    base, number = _parts(last)
    if base not in KNOWN:
        return Metric(name, OTHER)
    metric = replace(KNOWN[base], label=KNOWN[base].label.format(number))
    return replace(metric, group=f"Classification: {task}") if task else metric


def sort_key(name: str) -> tuple[int, str, int, int, str]:
    """Orders metrics as a reader wants them: by group, then as `KNOWN` has them."""
    group = metric_of(name).group
    place = GROUPS.index(group) if group in GROUPS else len(GROUPS) + (group == OTHER)
    base, number = _parts(name.rpartition("/")[2])
    return place, group, ORDER.index(base) if base in ORDER else len(ORDER), int(number or 0), name


def _parts(last: str) -> tuple[str, str]:
    numbered = re.fullmatch(r"(distinct|repetition|ex_acc_err|pass_at|mean_at)_(\d+)", last)
    return (numbered[1], numbered[2]) if numbered else (last, "")


def decimals_for(metric: Metric, values: list[float]) -> int:
    """Those of the metric; more where the row's largest number begins behind the point, fewer where it has many digits."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return metric.decimals
    digits = math.floor(math.log10(largest)) + 1  # before the point; negative for zeros behind it
    return min(6, max(0, min(metric.decimals - min(digits, 0), 5 - digits)))


def number(value: float, decimals: int) -> str:
    """``1234.5`` as ``1,234.5``, with a real minus sign and no negative zero."""
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.lstrip("-")
