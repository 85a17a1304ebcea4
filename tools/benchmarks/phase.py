"""P5: a MiniLLM phase against the schedule of forward passes of its reference code.

The reference (microsoft/LMOps, minillm/) runs both models at every token, mixes their distributions, and keeps the scores of each
step. Then the teacher scores the responses for the rewards, and the student for the old log-probabilities. Every mini-batch of
every inner epoch runs the student with all logits and, for the Single term, the teacher again.

Here this schedule is written anew, on the same models, with the same losses as ours (the paper's settings) and the same optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from benchmarks.measure import Bench, alternate, warm_up
from benchmarks.models import Pair, pair_of, random_prompts, random_texts
from benchmarks.results import Result, at_least, compared
from benchmarks.training import RATE, Watch, train
from lit_distill.objectives import NextToken, PolicyGradient, ReverseKL
from lit_distill.sources import TeacherMixedRollouts
from lit_distill.types import Batch, Prompts, Sequences

ALPHA, CLIP, INNER_EPOCHS = 0.2, 0.2, 4


def minillm(bench: Bench) -> Iterator[Result]:
    """One phase: rollouts, scores, and four inner epochs with a corpus."""
    rows, columns, new_tokens, mini_batch = bench.size((4, 8, 8, 2), (8, 32, 64, 4), (64, 128, 256, 16))
    pair = pair_of(bench)
    prompts = random_prompts(bench, pair.vocabulary_size, rows, columns)
    steps = INNER_EPOCHS * rows // mini_batch
    corpus = random_texts(bench, pair.vocabulary_size, torch.full((steps,), bench.size(8, 64, 512)), seed=2)
    reference = Reference(bench, pair, prompts, corpus, new_tokens, mini_batch)
    batch = Batch(tuple(map(str, range(rows))), prompts=prompts, corpus=corpus)

    def ours() -> float:
        source = TeacherMixedRollouts(ALPHA, new_tokens, mini_batch_size=mini_batch, inner_epochs=INNER_EPOCHS, seed=0)
        objectives = {"long": PolicyGradient(clip_range=CLIP), "single": ReverseKL(importance_weighted=True)}
        watch = Watch(bench.machine)
        return train(
            bench, pair, objectives, [batch], watch, steps, source=source, corpus_objectives={"corpus": NextToken()}
        ).seconds

    ways = {"ours": ours, "peer": bench.clock(reference.phase)}
    work = warm_up(pair.models, ways)
    seconds = alternate(ways, bench.repeats, warm_up=False)
    size = f"{rows} x {new_tokens} tokens, {steps} steps in {INNER_EPOCHS} inner epochs"
    what = f"MiniLLM phase, {size}, against the reference's schedule"
    yield compared(what, seconds["ours"], seconds["peer"], at_least(3), work)


class Reference:
    """The schedule of the reference code.

    Args:
        bench: device and precision.
        pair: both models.
        prompts: ``[B, P]``, of one length.
        corpus: plain text, one row or more a step.
        new_tokens: T.
        mini_batch: rollouts of a step.
    """

    def __init__(
        self, bench: Bench, pair: Pair, prompts: Prompts, corpus: Sequences, new_tokens: int, mini_batch: int
    ) -> None:
        self.bench = bench
        self.student: PreTrainedModel = pair.student.model
        self.teacher: PreTrainedModel = pair.teacher.lm.model
        self.prompts = prompts
        self.corpus = corpus
        self.new_tokens = new_tokens
        self.mini_batch = mini_batch

    def phase(self) -> None:
        """Roll out, score and train once; the optimiser is new, as ours is."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, fused=True)
        with torch.no_grad(), self.bench.machine.autocast(self.bench.precision):
            texts, mixed_logprobs = self.decode()
            teacher_logprobs = self.logprobs(self.teacher, texts)
            old_logprobs = self.logprobs(self.student, texts)
        rewards = teacher_logprobs - old_logprobs
        following = rewards.flip(-1).cumsum(-1).flip(-1) - rewards
        left = torch.arange(self.new_tokens - 1, -1, -1, device=rewards.device).clamp(min=1)
        advantages, weights = following / left, (old_logprobs - mixed_logprobs).exp()
        generator = torch.Generator().manual_seed(0)
        size, step = self.mini_batch, 0
        self.student.train()
        for _ in range(INNER_EPOCHS):
            order = torch.randperm(len(texts), generator=generator).to(texts.device)
            for rows in order.split(size):
                with self.bench.machine.autocast(self.bench.precision):
                    loss = self.loss(texts[rows], old_logprobs[rows], advantages[rows], weights[rows], step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        self.student.eval()

    def decode(self) -> tuple[Tensor, Tensor]:
        """Both models at every token, each with its cache; all steps' distributions are kept for the sampler's log-probabilities.

        Returns:
            ``[B, P + T]`` prompts and responses, and ``[B, T]`` log p̃ of each token.
        """
        texts, mask = self.prompts.input_ids, self.prompts.attention_mask
        models = (self.student, self.teacher)
        caches = [DynamicCache(config=model.config) for model in models]
        new, kept = texts, []
        for _ in range(self.new_tokens):
            q, p = (
                model(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
                .logits[:, -1].float().softmax(dim=-1)
                for model, cache in zip(models, caches, strict=True)
            )  # fmt: skip
            kept.append(((1 - ALPHA) * q + ALPHA * p).log())
            new = kept[-1].exp().multinomial(1)
            texts, mask = torch.cat([texts, new], dim=-1), F.pad(mask, (0, 1), value=1)
        scores = torch.stack(kept, dim=1)
        responses = texts[:, -self.new_tokens :]
        return texts, scores.log_softmax(dim=-1).gather(-1, responses[..., None])[..., 0]

    def response_logits(self, model: PreTrainedModel, texts: Tensor) -> Tensor:
        """Logits ``[b, T, V]`` float32 of the response tokens; the model computes those of the prompt too."""
        logits: Tensor = model(input_ids=texts, attention_mask=torch.ones_like(texts), use_cache=False).logits
        return logits[:, -self.new_tokens - 1 : -1].float()

    def logprobs(self, model: PreTrainedModel, texts: Tensor) -> Tensor:
        """``[b, T]`` log-probabilities of the response tokens."""
        responses = texts[:, -self.new_tokens :, None]
        return self.response_logits(model, texts).log_softmax(dim=-1).gather(-1, responses)[..., 0]

    def loss(self, texts: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, step: int) -> Tensor:
        """Long + Single + corpus, as means over tokens; the teacher scores the mini-batch anew."""
        log_q = self.response_logits(self.student, texts).log_softmax(dim=-1)
        with torch.no_grad():
            log_p = self.response_logits(self.teacher, texts).log_softmax(dim=-1)
        logprobs = log_q.gather(-1, texts[:, -self.new_tokens :, None])[..., 0]
        ratios = (logprobs - old_logprobs).exp() * weights
        long = -torch.minimum(advantages * ratios, advantages * ratios.clamp(1 - CLIP, 1 + CLIP)).mean()
        single = (weights * (log_q.exp() * (log_q - log_p)).sum(dim=-1)).mean()
        rows = self.corpus.slice(step % len(self.corpus), step % len(self.corpus) + 1)
        model = partial(self.student, use_cache=False)
        logits = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits[:, :-1].float()
        targets = rows.target_mask[:, 1:]
        corpus = F.cross_entropy(logits[targets], rows.input_ids[:, 1:][targets])
        return long + single + corpus
