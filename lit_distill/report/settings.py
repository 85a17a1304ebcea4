"""Which settings make two runs comparable, and in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Settings = dict[str, str]
"""Key → value of a configuration, flat."""

TEST = (
    *("data", "generation", "calibration", "exposure_bias", "on_policy"),
    *("trainer.limit_test_batches", "trainer.precision"),
)
"""What decides which texts a test measures and how."""
NOT_THE_METHOD = (
    *("seed_everything", "data.init_args.seed", "ckpt_path", "run_name", "config", "verbose", "report", "export"),
    *("weights_only", "predictions", "rollouts", "calibration", "exposure_bias", "on_policy", "checkpoint"),
    *("model.prediction",),
    *("generation.num_samples", "trainer.default_root_dir", "trainer.logger", "trainer.enable_progress_bar"),
    *("trainer.enable_model_summary", "trainer.log_every_n_steps", "trainer.limit_test_batches"),
)
"""What may differ between trainings that only differ in their seed."""
MOST_NAMED = 2
LONGEST = 30
"""Characters of a value in a name."""


def test_settings(report: Mapping[str, Any]) -> Settings:
    """Settings of the test; the seeds of its draws are among them, the order's seed is not."""
    flat = flatten(report.get("config"))
    return {key: value for key, value in flat.items() if _within(key, TEST) and key != "data.init_args.seed"}


def teacher_settings(report: Mapping[str, Any]) -> Settings:
    """What a teacher's metrics depend on: the settings of the test, and those of its model."""
    flat = flatten(report.get("config"))
    return test_settings(report) | {key: value for key, value in flat.items() if _within(key, ["model.teacher"])}


def method_settings(report: Mapping[str, Any]) -> Settings:
    """Settings of the training without seeds and places; those of the test's model without a training."""
    if report.get("training_config"):
        return {k: v for k, v in flatten(report["training_config"]).items() if not _within(k, NOT_THE_METHOD)}
    return {key: value for key, value in flatten(report.get("config")).items() if _within(key, ["model.student"])}


def differing(settings: Sequence[Settings]) -> dict[str, list[str]]:
    """Key → the value in each of ``settings``, of those keys that differ; ``""`` where one has no such key."""
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = {key: [one.get(key, "") for one in settings] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def distinctions(groups: Sequence[Sequence[Settings]]) -> list[str]:
    """What to call groups of runs: ``key value`` of the settings that are alike inside each and tell them apart.

    Empty where these are none or more than `MOST_NAMED`.
    """
    keys = [
        key
        for key in differing([one for group in groups for one in group])
        if all(len({one.get(key, "") for one in group}) == 1 for group in groups)
    ]
    if len(keys) > MOST_NAMED:
        return [""] * len(groups)
    return [", ".join(f"{key} {_short(group[0].get(key, 'null'))}" for key in keys) for group in groups]


def flatten(config: Any, prefix: str = "") -> Settings:
    """``{"a": {"b": 1}}`` as ``{"a.b": "1"}``; lists count their entries, what is absent is left out."""
    if isinstance(config, list) and any(isinstance(entry, (Mapping, list)) for entry in config):
        config = dict(enumerate(config))
    if not isinstance(config, Mapping):
        return {} if config is None else {prefix: str(config)}
    flat: Settings = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"


def _within(key: str, places: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{place}.") for place in places)
