"""Mixed rollouts on the device: recorded log-probabilities against one forward pass over the finished sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_checks.machine import Machine
from gpu_checks.runs import ASSETS
from gpu_checks.table import Row, below, holds
from lit_distill.data import ProceduralData
from lit_distill.generation import Decoder
from lit_distill.models import CausalLM, ModelSpec, load_tokenizer, stop_token_ids
from lit_distill.sources import RolloutContext, TeacherMixedRollouts
from lit_distill.teachers import FrozenTeacher, LocalTeacher, load_models
from lit_distill.types import Batch, Trajectories

LIMITS = {"32-true": (1e-4, 1e-3), "bf16-mixed": (1e-2, 0.3)}
"""Mean and largest difference in nats."""


def checks(machine: Machine) -> list[tuple[str, Callable[[], Iterable[Row]]]]:
    """One check per precision."""
    return [("mixed rollouts", partial(mixed, machine, precision)) for precision in LIMITS]


def pair_on(machine: Machine, precision: str) -> tuple[CausalLM, FrozenTeacher, tuple[int, ...]]:
    """Load student, teacher and stop tokens of the embedded pair, as a run does."""
    specs = ModelSpec(str(ASSETS / "student")), ModelSpec(str(ASSETS / "teacher"))
    specs[1].dtype = "bfloat16" if precision == "bf16-mixed" else None
    tokenizer = load_tokenizer(specs[0], "model.student")
    with machine.device:
        student, frozen = load_models(specs[0], {"teacher": LocalTeacher(specs[1])}, tokenizer)
    teacher = frozen["teacher"]
    assert isinstance(teacher, FrozenTeacher)
    stops = stop_token_ids(tokenizer, student.model.generation_config)
    return student.to(machine.device), FrozenTeacher(teacher.lm.to(machine.device)), stops


def batch_on(machine: Machine, size: int) -> Batch:
    """A batch of prompts of the synthetic tasks."""
    data = ProceduralData(size, num_validation=1, num_test=1, batch_size=size, tokenizer=str(ASSETS / "student"))
    data.setup("fit")
    return next(iter(data.train_dataloader())).to(machine.device)


@torch.no_grad()
def mixed(machine: Machine, precision: str, graphs: bool = False) -> Iterator[Row]:
    """Check the recorded log-probabilities of both models, and the teacher's computed from its kept hidden states."""
    student, teacher, stops = pair_on(machine, precision)
    student.cuda_graphs = teacher.lm.cuda_graphs = graphs
    source = TeacherMixedRollouts(alpha=0.4, max_new_tokens=64 if machine.cuda else 24, mini_batch_size=1, seed=1)
    batch = batch_on(machine, 64 if machine.cuda else 8)
    generators = {"student": Decoder(student, stops, teacher)}
    context = RolloutContext(student, teacher, generators, 0, lambda: 1, 0, 1, lambda values: values, lambda _: None)
    with machine.autocast(precision):
        trajectories = source.roll_out(batch, context)
        own = rescored(student, trajectories)
    theirs = rescored(teacher.lm, trajectories)
    responses = trajectories.responses
    assert responses.teacher_logprobs is not None
    assert responses.teacher_hidden is not None
    kept = teacher.head().logits(responses.teacher_hidden.flatten(0, 1)).log_softmax(dim=-1)
    kept = kept.gather(-1, responses.ids.flatten()[:, None]).view(responses.ids.shape)
    mask = responses.mask
    mean, largest = LIMITS[precision]
    for name, recorded, reference in (
        ("student", responses.logprobs, own),
        ("teacher", responses.teacher_logprobs, theirs),
        ("teacher's kept rows", kept, theirs),
    ):
        gaps = (recorded - reference).abs()[mask]
        yield below(f"{precision}: {name}: log-probabilities against a re-score, nats", float(gaps.mean()), mean)
        yield below(f"{precision}: {name}: the largest difference", float(gaps.max()), largest)
    from_teacher = responses.from_teacher
    assert from_teacher is not None
    both = bool(from_teacher.any()) and bool((mask & ~from_teacher).any())
    yield holds(
        f"{precision}: both models have sampled tokens",
        both,
        f"{int(mask.sum())} tokens, {int(from_teacher.sum())} the teacher's",
    )


def rescored(lm: CausalLM, trajectories: Trajectories) -> Tensor:
    """``[B, T]`` log-probabilities of the response tokens from one forward pass over prompt and response, without a cache."""
    text = trajectories.sequences()
    positions = (text.attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    was_training = lm.training
    lm.eval()
    output = lm.model(text.input_ids, attention_mask=text.attention_mask, position_ids=positions, use_cache=False)
    lm.train(was_training)
    width = trajectories.responses.ids.shape[1]
    logprobs = output.logits[:, -width - 1 : -1, : lm.vocabulary_size].double().log_softmax(dim=-1)
    return logprobs.gather(-1, trajectories.responses.ids[..., None])[..., 0].float()
