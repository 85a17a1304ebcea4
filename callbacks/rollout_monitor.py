"""Logs metrics of every phase of rollouts and a table of samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.callbacks.collapse import CollapseDetector
from lit_distill.callbacks.samples import show_samples
from lit_distill.functional import reverse_kl_k3
from lit_distill.sources import DatasetResponses
from lit_distill.types import check_sizes

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule
    from lit_distill.types import Trajectories

PERIODS = (1, 2, 3, 4)
SCORED = (
    "reward",
    "student_entropy",
    "teacher_entropy",
    "teacher_share",
    "reverse_kl_k1",
    "reverse_kl_k3",
    "effective_sample_size",
)
"""Additional metrics of a source that scores its responses."""


class RolloutMonitor(Callback):
    """Logs every phase of rollouts under ``rollout/``, over all ranks, and some of the responses as text.

    Per token that the student sampled: ``reverse_kl_k1`` and ``reverse_kl_k3``, unbiased for the prefixes of the rollouts.
    Per response token: ``reward``, ``student_entropy``, ``teacher_entropy``, ``teacher_share``, ``effective_sample_size`` (as a
    share of all tokens, from the importance weights). Per response: ``response_length``, ``unfinished`` (share cut off at
    max_new_tokens), and ``score_NAME`` for each reward of the user's own. Also ``repetition``, the largest share of tokens that
    equal the token at a fixed distance of 1 to 4 before, and ``tokens_per_second``. A source that does not score its responses has
    only the last four. One warning is logged if responses become empty, unfinished or repetitive.

    Args:
        every_n_phases: show samples at every n-th phase.
        num_samples: how many responses to show as text in TensorBoard; 0 shows none.
    """

    reads_entropies = True

    def __init__(self, every_n_phases: int = 10, num_samples: int = 8) -> None:
        check_sizes(every_n_phases=every_n_phases)
        self.every_n_phases = every_n_phases
        self.num_samples = num_samples
        self._phases = 0
        self._collapse = CollapseDetector()

    def metric_names(self, trainer: Trainer, pl_module: DistillationModule) -> list[str]:
        """Names of the metrics that a phase of rollouts logs; does not need the weights."""
        source = pl_module.source
        if isinstance(source, DatasetResponses):
            return []
        names = ["response_length", "unfinished", "repetition", "tokens_per_second"]
        names += [f"score_{name}" for name in getattr(source, "rewards", {})]
        if "old_logprobs" not in source.provides | source.provides_with_teacher:
            return [f"rollout/{name}" for name in names]
        return ["reverse_kl", *(f"rollout/{name}" for name in (*names, *SCORED))]

    def on_rollouts(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        """Log the metrics of the phase."""
        responses, signals = trajectories.responses, trajectories.signals
        mask = responses.mask
        per_token = {
            "reward": signals.get("rewards"),
            "student_entropy": responses.student_entropy,
            "teacher_entropy": responses.teacher_entropy,
            "teacher_share": responses.from_teacher,
        }
        sums = {name: (values * mask).sum() for name, values in per_token.items() if values is not None}
        sums |= {
            "tokens": mask.sum(),
            "responses": mask.any(dim=-1).sum(),
            "ended": responses.finished(pl_module.stop_ids).sum(),
        }
        if scored := responses.from_teacher is not None:
            student, teacher = signals["old_logprobs"], signals["teacher_logprobs"]
            own, weights = mask & ~responses.from_teacher, signals["importance_weights"] * mask
            sums |= {
                "reverse_kl_k1": ((student - teacher) * own).sum(),
                "reverse_kl_k3": (reverse_kl_k3(student, teacher) * own).sum(),
                "own": own.sum(),
                "weights": weights.sum(),
                "squares": weights.square().sum(),
            }
        sums |= {f"score_{name}": (values * mask.any(dim=-1)).sum() for name, values in trajectories.scores.items()}
        for back in PERIODS:
            again = (responses.ids[:, back:] == responses.ids[:, :-back]) & mask[:, back:]
            sums[f"again_{back}"] = again.sum()
        totals = pl_module.sum_over_ranks(torch.stack([value.double() for value in sums.values()]))
        total = dict(zip(sums, totals, strict=True))
        tokens, num_responses = total["tokens"].clamp(min=1), total["responses"].clamp(min=1)
        metrics = {f"rollout/{name}": total[name] / tokens for name in per_token if name in total}
        metrics |= {
            "rollout/response_length": tokens / num_responses,
            "rollout/unfinished": 1 - total["ended"] / num_responses,
            "rollout/repetition": torch.stack([total[f"again_{back}"] for back in PERIODS]).max() / tokens,
            "rollout/tokens_per_second": tokens / trajectories.seconds,
        }
        metrics |= {f"rollout/score_{name}": total[f"score_{name}"] / num_responses for name in trajectories.scores}
        if scored:
            metrics |= {f"rollout/{name}": total[name] / total["own"] for name in ("reverse_kl_k1", "reverse_kl_k3")}
            weighted = total["weights"].square() / total["squares"].clamp(min=1e-12)
            metrics["rollout/effective_sample_size"] = weighted / tokens
            pl_module.log("reverse_kl", metrics["rollout/reverse_kl_k1"], prog_bar=True, logger=False)
        pl_module.log_step_metrics(metrics)
        shape = [metrics[f"rollout/{name}"] for name in ("response_length", "unfinished", "repetition")]
        if warning := self._collapse.check(pl_module.global_step, *torch.stack(shape).tolist()):
            rank_zero_warn(warning)
        if self._phases % self.every_n_phases == 0:
            self._show(trainer, pl_module, trajectories)
        self._phases += 1

    def state_dict(self) -> dict[str, Any]:
        """Metrics of the first and latest phases, so that a resumed run compares with the same ones."""
        return {"first": self._collapse.first, "last": self._collapse.last, "told": self._collapse.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore these metrics."""
        self._collapse.first, self._collapse.last = state_dict["first"], state_dict["last"]
        self._collapse.warned = state_dict["told"]

    def _show(self, trainer: Trainer, pl_module: DistillationModule, trajectories: Trajectories) -> None:
        count = self.num_samples
        texts = pl_module.response_texts(trajectories.responses)[:count]
        heads, columns = ["prompt", "response"], [trajectories.prompt_texts[:count], texts]
        if (rewards := trajectories.signals.get("rewards")) is not None:
            heads.append("reward")
            columns.append([f"{r:.2f}" for r in (rewards * trajectories.responses.mask).sum(dim=-1)[:count].tolist()])
        rows = list(zip(*columns, strict=True))
        show_samples(trainer, "rollout/samples", heads, rows, pl_module.global_step)
