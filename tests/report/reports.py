"""Reports without a run, in which every text that comes from outside is hostile."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from lit_distill.report.record import make_report

HOSTILE = (
    '</p><script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> \x00\x0b\ud800 \u202e & "\''
)
BINS = [
    {"low": 0.0, "high": 0.5, "confidence": 0.4, "accuracy": 0.25, "count": 4},
    {"low": 0.5, "high": 1.0, "confidence": 0.9, "accuracy": 0.75, "count": 12},
]
SCORES = {"rouge_l": 50.0, "exact_match": 0.0, "response_length": 7.5, "unfinished": 0.25}
SECTIONS = {
    "calibration": [
        {"name": name, "role": role, "ece": 0.1, "accuracy": 0.6, "count": 16, "bins": BINS}
        for name in ("next token", HOSTILE)
        for role in ("student", "teacher")
    ],
    "exposure_bias": [
        {
            "lengths": [1, 2, 3],
            "ex_acc_err": [None, 10.0, 12.5],
            "regret_student": [0.0, 0.5, 0.9],
            "regret_teacher": [0.0, 0.4, 0.8],
            "num_prompts": 5,
            "num_samples": 2,
        }
    ],
    "generation": [
        {
            "role": role,
            "scores": {"rouge_l": {"mean": 50.0, "std": None, "n": 1}},
            "buckets": [{"label": "under 4 words", "low": 0, "high": 3, "count": 3, "scores": SCORES}],
            "samples": [{"id": HOSTILE, "prompt": HOSTILE, "response": HOSTILE + role, "reference": HOSTILE}],
        }
        for role in ("student", "teacher")
    ],
    "judge": [{"model": HOSTILE, "swap": True, "ratio": 71.0, "cost": 0.01, "samples": []}],
    "mine": [{"anything": HOSTILE}],
}


def report_of(name: str = "kd", seed: int = 1, perplexity: float = 3.0, trained: bool = True, **changes) -> dict:
    metrics = {
        "perplexity": perplexity,
        "teacher_perplexity": 2.0,
        "rouge_l": 50.0,
        HOSTILE: 1.0,
        "task/teacher_ece": 0.1,
    }
    folder = Path("runs") / "x" / f"version_{seed}"
    report = make_report(
        folder, metrics, SECTIONS, f"models/{HOSTILE}", "models/big", {"data": {"class_path": HOSTILE}}, seed=seed
    )
    report["run"]["name"] = name
    if trained:
        report["checkpoint"] = {"path": str(folder / "last.ckpt"), "step": 100, "folder": str(folder)}
        curve = {"steps": [1, 2, 3], "values": [3.0, 2.0, 1.0 + seed]}
        report["curves"] = {
            "train/loss": curve,
            "val/perplexity": curve,
            "val/rouge_l": {"steps": [3], "values": [1.0]},
        }
    return report | changes


def parsed(drawing: object) -> ET.Element:
    """A drawing as a browser sees it; fails where it is not well-formed."""
    return ET.fromstring(str(drawing))  # noqa: S314 - our own output
