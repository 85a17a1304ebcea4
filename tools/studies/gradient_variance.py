"""Variance of the gradient of reverse KL on the student's text: of all tokens, and of sampled tokens with and without baseline.

Run: python tools/studies/gradient_variance.py --batches 64          (half a minute on one core)

Student and teacher are the shipped ones. Each batch has other prompts and responses; variance is the mean squared distance of the
gradient of a batch from the mean over the batches, as a multiple of the squared length of the mean gradient of the full divergence.
"""

from __future__ import annotations

import argparse

import torch

from lit_distill.data import ProceduralData
from lit_distill.generation import Decoder, SamplingParams
from lit_distill.generation.sampling import phase_keys
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import ModelSpec, load_tokenizer, stop_token_ids
from lit_distill.objectives import Objective, ReverseKL, SampledReverseKL
from lit_distill.teachers import FrozenTeacher, LocalTeacher, load_models
from lit_distill.types import Batch, Sequences, join_prompts

ASSETS = "lit_distill/assets"
OBJECTIVES: dict[str, Objective] = {
    "ReverseKL": ReverseKL(),
    "SampledReverseKL, baseline": SampledReverseKL(baseline=True),
    "SampledReverseKL": SampledReverseKL(baseline=False),
}


def gradients(num_batches: int, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
    """The gradient of each objective on each batch, ``[batches, parameters]``."""
    spec = ModelSpec(f"{ASSETS}/student")
    tokenizer = load_tokenizer(spec, "student")
    student, frozen = load_models(spec, {"teacher": LocalTeacher(ModelSpec(f"{ASSETS}/teacher"))}, tokenizer)
    teacher = frozen["teacher"]
    assert isinstance(teacher, FrozenTeacher)
    decoder = Decoder(student, stop_token_ids(tokenizer, student.model.generation_config))
    evaluator = ObjectiveEvaluator(OBJECTIVES, student, teacher, "objectives")
    data = ProceduralData(num_batches * batch_size, batch_size=batch_size, tokenizer=spec.path)
    data.setup("fit")
    found: dict[str, list[torch.Tensor]] = {name: [] for name in OBJECTIVES}
    for number, batch in enumerate(data.train_dataloader()):
        text = _rollouts(decoder, batch, seed, number)
        for name, rows in found.items():
            student.zero_grad()
            loss, terms = evaluator(text, {name: 1.0})
            (loss / terms[name].count).backward()
            rows.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    return {name: torch.stack(rows) for name, rows in found.items()}


def _rollouts(decoder: Decoder, batch: Batch, seed: int, number: int) -> Sequences:
    assert batch.prompts is not None
    sampling = SamplingParams(max_new_tokens=64)
    responses = decoder.generate(batch.prompts, phase_keys(number, batch.ids), sampling, seed)
    return join_prompts(batch.prompts, responses, {}, batch.items)


def main(arguments: list[str] | None = None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    found = gradients(given.batches, given.batch_size, given.seed)
    exact = found["ReverseKL"].mean(dim=0)
    print("| | variance | cosine of the mean with that of ReverseKL |\n|---|---|---|")
    for name, rows in found.items():
        mean = rows.mean(dim=0)
        variance = (rows - mean).square().sum(dim=1).sum() / (len(rows) - 1) / exact.square().sum()
        print(f"| {name} | {variance:.2f} | {torch.cosine_similarity(mean, exact, dim=0):.3f} |")


if __name__ == "__main__":
    main()
