"""Checks on the arguments of the module."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

METRICS = (
    r"loss|learning_rate|skipped_steps|step|epoch|(teacher_)?perplexity|top1_agreement|rouge_l|exact_match|answer_accuracy|response_length"
    r"|unfinished|((distinct|repetition|pass_at|mean_at|ex_acc_err)_\d+)|sampled_length|sampled_unfinished|top_k_overlap|on_policy_\w+"
    r"|accuracy|(adaptive_)?ece|brier|mass|judge_\w+|\w*nll"
)
"""What the package itself logs under ``train/`` and ``val/``. An objective may be called ``forward_kl`` or ``reverse_kl``."""


def check_constructed(objectives: Mapping[str, object], key: str) -> None:
    """Refuse an objective whose constructor does not call that of its base class.

    Raises:
        ValueError: with the key.
    """
    for name, objective in objectives.items():
        if "_modules" not in vars(objective) or not hasattr(objective, "weight"):
            raise ValueError(
                f"{key}.{name}: the constructor of {type(objective).__name__} does not call super().__init__(weight). Call it "
                "first."
            )


def check_names(objectives: Iterable[str], corpus_objectives: Iterable[str]) -> None:
    """Refuse names of objectives that are missing, used twice, or not usable in names of metrics.

    Raises:
        ValueError: with the key.
    """
    names, others = list(objectives), list(corpus_objectives)
    if not names:
        raise ValueError("objectives: at least one is needed, such as `kd: ForwardKL`.")
    if both := sorted(set(names) & set(others)):
        raise ValueError(f"corpus_objectives: {both[0]!r} is also in model.objectives; give it another name.")
    for name in (*names, *others):
        key = "objectives" if name in names else "corpus_objectives"
        if not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"{key}: {name!r} cannot be a name. Use letters, digits and _, such as `kd`, and not the name "
                "of a method of dictionaries, such as `keys`."
            )
        if re.fullmatch(METRICS, name):
            raise ValueError(
                f"{key}: {name!r} is the name of a metric, which would be mixed up with the objective's value. Give it another "
                "name, such as `kd`."
            )
