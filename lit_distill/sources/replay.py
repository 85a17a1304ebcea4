"""DistiLLM's source: the dataset, new responses of the student, or earlier ones from a replay buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lit_distill.data.collate import pad_sequences
from lit_distill.generation import SamplingParams
from lit_distill.generation.sampling import keyed_generator
from lit_distill.sources.base import RolloutContext, require_prompts
from lit_distill.sources.sampled import OffPolicy, _StudentResponses
from lit_distill.types import ArgumentError, check_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.types import Batch, Sequences


class Text(NamedTuple):
    """A prompt and the student's response to it, in host memory."""

    ids: Tensor
    """[n] int32: the prompt followed by the response with its end-of-sequence token; no padding."""
    prompt_length: int


class ReplayRollouts(_StudentResponses):
    r"""DistiLLM's adaptive off-policy source: dataset, student, or a buffer of the student's earlier responses.

    At step t of T, one uniform number r in [0, 1), the same on all ranks, selects where the batch comes from. If r < φ(1 − t/T),
    or r < φ while the buffer is not full, the student generates responses to its prompts. Else, if r < φ, the batch is sampled
    from the buffer. Else it is the dataset's, or the teacher's. φ rises when the validation loss rises: then the
    student has begun to overfit.

    | | paper, algorithm 1 | released code | here |
    |---|---|---|---|
    | training sequences | sampled from the buffer, new ones stored before | new ones, stored as well | as the code |
    | probability of new responses | φ(1 − t/T) | φ(1 − t/T), φ/2 or φt/T; φ while the buffer fills | as the code |
    | r and buffer | one | one per rank | one for all ranks |
    | validation loss | not specified | cross-entropy | ``val/loss``, the loss of the objectives |
    | compared with the loss | before | at the last rise of φ or before training | at the last rise of φ or the first validation |

    The buffer, φ and the loss to compare with are saved in every checkpoint.

    Args:
        initial_probability: φ at the start, in [0, 1].
        increment: added to φ at each rise, up to 1; 0 keeps φ constant.
        tolerance: φ rises if the validation loss has risen by this many nats per token.
        capacity: size of the buffer in sequences, over all ranks; the oldest are dropped first.
        replay_schedule: how the share of new responses changes over the run once the buffer is full.
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 samples from all.
        top_p: sample from the smallest set of tokens with this much probability.
        seed: seed of all random numbers; ``seed_everything`` by default.
        off_policy: whose responses the other batches have; the "teacher" needs prompts alone.

    Source: Ko et al. 2024, https://arxiv.org/abs/2402.03898, section 3.2; code: https://github.com/jongwooko/distillm.
    """

    keeps_items = False

    def __init__(
        self,
        initial_probability: float = 0.0,
        increment: float = 0.1,
        tolerance: float = 0.1,
        capacity: int = 1000,
        replay_schedule: Literal["decreasing", "constant", "increasing"] = "decreasing",
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        off_policy: OffPolicy = "dataset",
    ) -> None:
        super().__init__(SamplingParams(max_new_tokens, temperature, top_k, top_p), seed, off_policy)
        for name, value in (("initial_probability", initial_probability), ("increment", increment)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {value}.")
        if not tolerance >= 0:
            raise ValueError(f"tolerance: expected 0 or more nats, got {tolerance}.")
        if replay_schedule not in ("decreasing", "constant", "increasing"):
            raise ValueError(f"replay_schedule: expected decreasing, constant or increasing, got {replay_schedule!r}.")
        check_sizes(capacity=capacity)
        self.probability = initial_probability
        self.increment = increment
        self.tolerance = tolerance
        self.replay_schedule = replay_schedule
        self.texts: deque[Text] = deque(maxlen=capacity)
        self.capacity = capacity
        self.reference_loss: float | None = None
        self.needs_teacher = off_policy == "teacher"

    @property
    def _uses_others(self) -> bool:
        return self.probability < 1

    def check_trainer(self, trainer: Any) -> None:
        """Reject a run without the validation that changes φ, a run without an end, and a buffer smaller than a batch."""
        super().check_trainer(trainer)
        data = trainer.datamodule
        if self.increment and not (trainer.limit_val_batches and getattr(data, "has_validation", True)):
            raise ValueError(
                "ReplayRollouts lets the student generate more often when the validation loss rises, but there is "
                "no validation. Set data.init_args.validation or validation_size, or increment: 0 to keep "
                "initial_probability."
            )
        if trainer.max_steps == trainer.max_epochs == -1:
            raise ValueError(
                "ReplayRollouts has a schedule over the whole run, but the run has no end. Set trainer.max_steps or "
                "trainer.max_epochs."
            )
        if self.capacity < (batch_size := getattr(data, "batch_size", 1)):
            raise ValueError(
                f"capacity: {self.capacity} sequences do not fill a batch of data.init_args.batch_size ({batch_size}). "
                "Set at least that."
            )

    def mini_batches(self, batch: Batch, context: RolloutContext) -> Iterator[Sequences]:
        """New responses of the student, earlier ones from the buffer, or the dataset's."""
        r = float(torch.rand((), generator=keyed_generator(self.seed, context.step, "replay")))
        filling = r < self.probability and len(self.texts) < self.capacity
        if filling or r < self.probability * self._new_share(context.step / context.total_steps()):
            for text in super().mini_batches(batch, context):
                self.texts += gather_texts(text, len(batch.ids), context)
                yield text
        elif r < self.probability:
            yield self._sample_buffer(batch, context)
        else:
            yield from self._other_responses(batch, context)

    def _new_share(self, progress: float) -> float:
        """Share of new responses among the batches with the student's responses, once the buffer is full."""
        return {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.replay_schedule]

    def _sample_buffer(self, batch: Batch, context: RolloutContext) -> Sequences:
        """Sample as many sequences as the batch has items, without replacement; returns this rank's share."""
        device = require_prompts(batch, self).input_ids.device
        count = int(context.sum_over_ranks(torch.tensor(len(batch.ids), device=device)))
        order = torch.randperm(len(self.texts), generator=keyed_generator(self.seed, context.step, "draw"))[:count]
        chosen = [self.texts[index] for index in order[context.rank :: context.world_size].tolist()]
        rows = [(text.ids[: text.prompt_length].tolist(), text.ids[text.prompt_length :].tolist()) for text in chosen]
        return pad_sequences(rows, pad_id=0).to(device)

    def observe_validation(self, metrics: Mapping[str, Tensor]) -> None:
        """Raise φ if the loss has risen."""
        if not self.increment:
            return
        if "loss" not in metrics:
            raise ArgumentError(
                self,
                "ReplayRollouts has no validation loss to adapt its probability to, since the validation items have no responses. "
                "Add responses, set data.init_args.responses: true, or increment: 0.",
            )
        loss = float(metrics["loss"])
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self.tolerance:
            self.probability = min(1.0, self.probability + self.increment)
            self.reference_loss = loss

    def metrics(self) -> dict[str, float]:
        """φ, and the number of sequences in the buffer."""
        return {"replay_probability": self.probability, "buffer_size": float(len(self.texts))}

    def state_dict(self) -> dict[str, Any]:
        """The buffer as one row of concatenated tokens with the lengths, φ, and the loss to compare with."""
        lengths = [[len(text.ids), text.prompt_length] for text in self.texts]
        return {
            "ids": torch.cat([torch.empty(0, dtype=torch.int32), *(text.ids for text in self.texts)]),
            "lengths": torch.tensor(lengths, dtype=torch.int32).view(-1, 2),
            "probability": self.probability,
            "reference_loss": self.reference_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the buffer, φ and the loss; if the capacity is smaller now, the newest sequences are kept."""
        if not state:
            return
        sizes, prompt_lengths = state["lengths"].T.tolist()
        rows = state["ids"].split(sizes)
        self.texts.clear()
        self.texts.extend(map(Text, rows, prompt_lengths))
        self.probability = state["probability"]
        self.reference_loss = state["reference_loss"]


def gather_texts(text: Sequences, num_items: int, context: RolloutContext) -> list[Text]:
    """Gather the sequences of all ranks in the order of the batch; rank r of W has the items r, r + W, ….

    Args:
        text: prompts of this rank with the generated responses.
        num_items: how many of its rows are items; the other rows are dummies.
        context: rank, number of ranks and the sum over ranks.
    """
    attended, targets = text.attention_mask[:num_items].bool(), text.target_mask[:num_items]
    mine = slice(context.rank, None, context.world_size)
    count = context.sum_over_ranks(torch.tensor(num_items, device=attended.device))
    sizes = torch.zeros(int(count), 2, dtype=torch.int64, device=attended.device)
    sizes[mine] = torch.stack([attended.sum(dim=-1), (attended & ~targets).sum(dim=-1)], dim=-1)
    sizes = context.sum_over_ranks(sizes)
    columns = torch.arange(int(sizes[:, 0].max()), device=sizes.device)
    ids = torch.zeros(len(sizes), len(columns), dtype=torch.int64, device=sizes.device)
    ids[mine] = ids[mine].masked_scatter(columns < sizes[mine, :1], text.input_ids[:num_items][attended])
    rows = context.sum_over_ranks(ids).to("cpu", torch.int32)
    return [Text(row[:size].clone(), prompt) for row, (size, prompt) in zip(rows, sizes.tolist(), strict=True)]
