"""P3: an on-policy step against TRL's. P4: a step on a dataset against a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MB, Bench, alternate, warm_up
from benchmarks.models import Pair, pair_of, random_prompts, random_texts
from benchmarks.results import Result, at_least, at_most, compared, limited, skipped
from benchmarks.training import RATE, Step, Watch, train
from benchmarks.trl_peer import NOT_INSTALLED, installed, on_policy_step
from lit_distill.objectives import ForwardKL, NextToken, ReverseKL
from lit_distill.sources import StudentRollouts
from lit_distill.types import Batch, Prompts, Sequences

LOSSES = 0.1
"""Largest relative difference of two mean losses that counts as the same loss, on other samples."""


def _batch(prompts: Prompts | None = None, texts: Sequences | None = None) -> Batch:
    items = prompts if texts is None else texts
    assert items is not None
    return Batch(tuple(map(str, range(len(items)))), prompts=prompts, sequences=texts)


def on_policy(bench: Bench) -> Iterator[Result]:
    """Student's own responses, reverse KL, AdamW, against TRL: same models, prompts and numbers of tokens."""
    rows, columns, new_tokens = bench.size((2, 8, 8), (8, 32, 64), (32, 128, 256))
    what = f"on-policy step, {rows} x {new_tokens} tokens, against TRL's DistillationTrainer"
    if not installed():
        yield skipped(what, NOT_INSTALLED)
        return
    pair = pair_of(bench)
    prompts = random_prompts(bench, pair.vocabulary_size, rows, columns)
    records: dict[str, list[Step]] = {"ours": [], "peer": []}

    def ours(memory: bool = False) -> float:
        source = StudentRollouts(max_new_tokens=new_tokens, seed=len(records["ours"]))
        batches = [_batch(prompts)] * 2
        records["ours"].append(
            train(bench, pair, {"rkl": ReverseKL()}, batches, Watch(bench.machine, memory), source=source)
        )
        return records["ours"][-1].seconds

    def peer(memory: bool = False) -> float:
        records["peer"].append(on_policy_step(bench, pair, prompts.input_ids, new_tokens, RATE, memory))
        return records["peer"][-1].seconds

    two_steps = {"ours in two steps": partial(ours, memory=True), "peer in two steps": partial(peer, memory=True)}
    work = warm_up(pair.models, two_steps)
    seconds = alternate({"ours": ours, "peer": peer}, bench.repeats, warm_up=False)
    goal = at_least(bench.size(1.6, 1.6, 4.0))
    yield compared(what, seconds["ours"], seconds["peer"], goal, f"{work} (TRL's kernel projects without its head)")
    peaks = [[steps[0].peak or float("nan")] for steps in records.values()]
    yield compared(
        "the same: memory beyond weights and optimiser", [peaks[0][0] / MB], [peaks[1][0] / MB], at_most(0.6), unit="MB"
    )
    means = [sum(step.loss for step in steps) / len(steps) for steps in records.values()]
    gap = abs(means[0] / means[1] - 1)
    note = f"{means[0]:.4f} and {means[1]:.4f} nats: the same loss, on responses of other random numbers"
    yield limited("the same: relative difference of the mean losses", gap, "", at_most(LOSSES), note)


def lognormal_lengths(count: int, shortest: int, longest: int) -> Tensor:
    """``[count]`` int64 lengths from a log-normal distribution, cut to the range; the median is the range's geometric mean."""
    generator = torch.Generator().manual_seed(1)
    middle = (shortest * longest) ** 0.5
    return (middle * torch.randn(count, generator=generator).mul(0.7).exp()).clamp(shortest, longest).long()


def offline(bench: Bench) -> Iterator[Result]:
    """Forward KL and cross-entropy on a dataset, with texts of one length and of many."""
    pair = pair_of(bench)
    count, length = bench.size((4, 16), (12, 128), (16, 512))
    shortest, longest = bench.size((4, 16), (32, 512), (32, 512))
    cases = {
        f"{count} texts of {length} tokens": (torch.full((count,), length), at_least(1.0)),
        f"{count} texts of {shortest} to {longest} tokens": (
            lognormal_lengths(count, shortest, longest),
            at_least(1.5),
        ),
    }
    small = random_texts(bench, pair.vocabulary_size, torch.full((2,), 8))
    for name, (lengths, goal) in cases.items():
        texts = random_texts(bench, pair.vocabulary_size, lengths)
        optimizer = torch.optim.AdamW(pair.student.parameters(), lr=RATE, fused=True)
        losses: dict[str, float] = {}

        def ours(texts: Sequences = texts, losses: dict[str, float] = losses) -> float:
            objectives = {"kd": ForwardKL(0.5), "ce": NextToken(0.5)}
            batches = [_batch(texts=part) for part in (small, texts)]  # the small one creates the optimiser's state
            step = train(bench, pair, objectives, batches, Watch(bench.machine))
            losses["ours"] = step.loss
            return step.seconds

        def peer(
            texts: Sequences = texts, optimizer: torch.optim.Optimizer = optimizer, losses: dict[str, float] = losses
        ) -> None:
            pair.student.train()
            losses["peer"] = plain_step(bench, pair, optimizer, texts)

        ways: dict[str, Callable[[], float]] = {"ours": ours, "peer": bench.clock(peer)}
        notes = [warm_up(pair.models, ways)]
        seconds = alternate(ways, bench.repeats, warm_up=False)
        notes.append(f"{int(lengths.sum()):,} tokens and {int(texts.target_mask.sum()):,} targets in the texts")
        notes.append(f"losses {losses['ours']:.4f} and {losses['peer']:.4f}")
        if abs(losses["ours"] / losses["peer"] - 1) > 0.02:
            raise RuntimeError(f"the two steps have other losses: {losses}")
        yield compared(
            f"KD step, {name}, against a loop written by hand", seconds["ours"], seconds["peer"], goal, ". ".join(notes)
        )


def plain_step(bench: Bench, pair: Pair, optimizer: torch.optim.Optimizer, texts: Sequences) -> float:
    """One step as a good loop does it: padded batch, logits of both models at the targets only, AdamW.

    Returns:
        The loss: half forward KL, half cross-entropy, as means over the targets.
    """
    targets = texts.target_mask[:, 1:]
    labels = texts.input_ids[:, 1:][targets]
    with bench.machine.autocast(bench.precision):
        with torch.no_grad():
            teacher = logits_at(pair.teacher.lm.model, texts, targets)
        student = logits_at(pair.student.model, texts, targets)
    log_q, log_p = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(labels)
    loss = 0.5 * divergence + 0.5 * F.nll_loss(log_q, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def logits_at(model: Any, texts: Sequences, targets: Tensor) -> Tensor:
    """Logits ``[N, V]`` that predict the targets, by a model of transformers."""
    body, project = partial(model.base_model, use_cache=False), model.get_output_embeddings()
    hidden = body(input_ids=texts.input_ids, attention_mask=texts.attention_mask).last_hidden_state
    return project(hidden[:, :-1][targets])
