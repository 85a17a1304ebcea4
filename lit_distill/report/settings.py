"""Which settings make two runs comparable, and in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lit_distill.report.record import Report

TEST_KEYS = ("data", "generation", "calibration", "exposure_bias", "trainer.limit_test_batches", "trainer.precision")
"""What decides which texts a test measures and how."""
NOT_THE_METHOD = (
    *(
        "seed_everything",
        "data.init_args.seed",
        "ckpt_path",
        "run_name",
        "config",
        "verbose",
        "report",
        "export",
        "weights_only",
    ),
    *("predictions", "rollouts", "calibration", "exposure_bias", "generation.num_samples", "trainer.default_root_dir"),
    *("trainer.logger", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
    *("model.prediction", "checkpoint", "trainer.limit_test_batches"),
)
"""What may differ between trainings that only differ in their seed."""
MOST_NAMED = 2
LONGEST = 30
"""Characters of a value in a name."""


def test_settings(report: Report) -> dict[str, str]:
    """Key → value of the settings of the test, flat; the seeds of its draws are among them, the order's seed is not."""
    flat = flatten(report.get("config") or {})
    return {key: value for key, value in flat.items() if _within(key, TEST_KEYS) and key != "data.init_args.seed"}


def teacher_settings(report: Report) -> dict[str, str]:
    """Key → value of what a teacher's metrics depend on: the settings of the test, and those of its model."""
    flat = flatten(report.get("config") or {})
    return test_settings(report) | {key: value for key, value in flat.items() if _within(key, ("model.teacher",))}


def method_settings(report: Report) -> dict[str, str]:
    """Key → value of the settings of the training, flat, without seeds and places; those of the test's model without a training."""
    if report.get("training_config"):
        flat = flatten(report["training_config"])
        return {key: value for key, value in flat.items() if not _within(key, NOT_THE_METHOD)}
    flat = flatten(report.get("config") or {})
    return {key: value for key, value in flat.items() if _within(key, ("model.student",))}


def differing(settings: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key → the value in each of ``settings``, of those keys that differ; ``""`` where one has no such key."""
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = {key: [one.get(key, "") for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def distinctions(groups: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """What to call groups of runs that are alike inside: ``key value`` of the settings that tell them apart.

    Empty where that are no settings or more than `MOST_NAMED`.
    """
    keys = [
        key
        for key in differing([one for group in groups for one in group])
        if all(len({one.get(key, "") for one in group}) == 1 for group in groups)
    ]
    if len(keys) > MOST_NAMED:
        return [""] * len(groups)
    return [", ".join(f"{key} {_short(group[0].get(key, 'null'))}" for key in keys) for group in groups]


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; lists count their entries, what is absent is left out."""
    if isinstance(config, Mapping):
        pairs = [(str(key), value) for key, value in config.items()]
    elif isinstance(config, list) and any(isinstance(entry, (Mapping, list)) for entry in config):
        pairs = [(str(index), value) for index, value in enumerate(config)]
    else:
        return {} if config is None else {prefix: str(config)}
    flat: dict[str, str] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"


def _within(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(place + ".") for place in places)
