"""What one test run leaves behind: `report.json`, a versioned record without NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are not worth a dependency

from lit_distill.files import write_text
from lit_distill.report.curves import read_curves

FORMAT = "lit-distill report"
VERSION = 2
FILE = "report.json"
REQUIRED = {"run": dict, "student": dict, "metrics": dict, "sections": dict, "curves": dict}

Report = dict[str, Any]


def make_report(
    folder: Path,
    metrics: Mapping[str, Any],
    sections: Mapping[str, Any],
    student: str,
    teacher: str | None = None,
    config: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    step: int | None = None,
    seed: int | None = None,
) -> Report:
    """The record of a test, JSON-able; what cannot be a number in JSON is None.

    Args:
        folder: of the test run.
        metrics: scalars, by name without ``test/``; those of the teacher begin with ``teacher_``.
        sections: what callbacks report, by section.
        student: where the student's weights or architecture come from.
        teacher: the same of the teacher.
        config: the test's whole configuration.
        checkpoint: the file whose student was tested; the curves and the configuration of its run are read beside it.
        step: the optimiser step of the checkpoint.
        seed: of the test; where the checkpoint's run has a configuration, its seed is that of the training.
    """
    trained_in = None if checkpoint is None else training_folder(checkpoint)
    training = read_config(trained_in / "config.yaml") if trained_in else {}
    seed = training.get("seed_everything", seed)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "run": {
            "name": run_name(trained_in or folder),
            "folder": str(folder),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seed": seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        },
        "student": {"path": student},
        "teacher": {"path": teacher} if teacher else None,
        "checkpoint": {"path": str(checkpoint), "step": step, "folder": str(trained_in)} if checkpoint else None,
        "config": config or {},
        "training_config": training,
        "metrics": metrics,
        "sections": sections,
        "curves": read_curves(trained_in / "metrics.csv") if trained_in else {},
    }
    plain: Report = jsonable(record)
    return plain


def jsonable(value: Any) -> Any:
    """``value`` in the types of JSON: numbers of any library as int or float, what is not finite as None, the rest as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # a tensor or an array
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence):
        return [jsonable(entry) for entry in value]
    return str(value)


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` to ``folder``, all of it or nothing, and say where."""
    path = folder / FILE
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return path


def read_report(path: Path) -> Report:
    """The record in a ``report.json``.

    Raises:
        ValueError: naming the file and the command that makes a good one.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}). {MAKE_ONE}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path}: is not a report of lit-distill. {MAKE_ONE}")
    if report.get("version") == 1 and "figures" in report:  # the name of the metrics until then
        report = {**report, "metrics": report["figures"], "version": VERSION}
    if report.get("version") != VERSION:
        raise ValueError(
            f"{path}: has version {report.get('version')!r} of the format, and this is for {VERSION}. Test that run again."
        )
    for key, kind in REQUIRED.items():
        if not isinstance(report.get(key), kind):
            raise ValueError(f"{path}: has no `{key}`; it was cut or changed. {MAKE_ONE}")
    return report


def find_reports(place: Path, key: str) -> list[Report]:
    """The reports at ``place``: a ``report.json``, the folder of a test, or a folder that holds several, however deep.

    The folder of a training has no report in it; its tests are looked for in the folders beside it.

    Args:
        place: where to look.
        key: who asks, for messages.

    Raises:
        ValueError: naming ``key`` and the command that makes a report.
    """
    if place.is_file():
        return [read_report(place)]
    if not place.is_dir():
        raise ValueError(f"{key}: there is no {place}. Give a run's folder or its {FILE}.")
    inside = [read_report(path) for path in sorted(place.rglob(FILE))]
    if inside:
        return inside
    here = place.resolve()
    beside = [read_report(path) for path in sorted(here.parent.glob(f"*/{FILE}"))]
    tests = [r for r in beside if r["checkpoint"] and Path(r["checkpoint"]["folder"]).resolve() == here]
    if not tests:
        raise ValueError(f"{key}: there is no {FILE} in {place}, and none of a test of it beside it. {_command(place)}")
    return tests


MAKE_ONE = f"A test writes {FILE}: lit-distill test --config CONFIG --ckpt_path CHECKPOINT"


def _command(place: Path) -> str:
    if not (place / "config.yaml").exists():
        return MAKE_ONE
    last = place / "checkpoints" / "last.ckpt"
    checkpoint = f" --ckpt_path {last}" if last.exists() else ""
    return f"Make it: lit-distill test --config {place / 'config.yaml'}{checkpoint}"


def training_folder(checkpoint: Path) -> Path:
    """The folder of the run that has saved ``checkpoint``."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def run_name(folder: Path) -> str:
    """``runs/kd/version_3`` is a run of the name ``kd``."""
    whole = folder.resolve()
    return whole.parent.name if whole.name.startswith("version_") else whole.name


def read_config(path: Path) -> dict[str, Any]:
    """A run's configuration; empty where none was kept."""
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config if isinstance(config, dict) else {}
