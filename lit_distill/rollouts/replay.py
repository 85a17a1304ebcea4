"""DistiLLM's source: the student's own texts, used again from a buffer, the more often the more it needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from lit_distill.data.collate import Item, collate
from lit_distill.rollouts.decoding import Decoding, stream
from lit_distill.rollouts.phases import KEY, check_sizes
from lit_distill.rollouts.sampled import _SampledResponses
from lit_distill.rollouts.sources import DatasetResponses, Players
from lit_distill.rollouts.speaking import prompts_of

if TYPE_CHECKING:
    from torch import Tensor

    from lit_distill.types import Batch, Sequences


class Text(NamedTuple):
    """A prompt and what the student answered, in host memory."""

    ids: Tensor
    """[n] int32: the prompt, and then the response with its end-of-sequence token; no padding."""
    prompt_length: int


class ReplayRollouts(_SampledResponses):
    r"""DistiLLM's adaptive off-policy source: dataset, student, or a buffer of what the student said before.

    At step t of T, a number r, uniform in [0, 1) and the same on all ranks, decides about the batch: if r < φ(1 − t/T), or r < φ
    while the buffer is not full, the student answers its prompts; else if r < φ, as many texts are drawn from the buffer; else
    it is the dataset's. φ rises when the validation loss does, which says that the student has begun to overfit the dataset.

    | | paper, algorithm 1 | released code | here |
    |---|---|---|---|
    | learns from | texts drawn from the buffer, new ones stored before | the new texts, stored as well | as the code |
    | new texts with probability | φ(1 − t/T) | φ(1 − t/T), φ/2 or φt/T; φ while the buffer fills | as the code |
    | r and buffer | one | one of each rank | one, whatever the number of ranks |
    | validation loss | not said | cross-entropy | ``val/loss``, that of the objectives |
    | compared with that | before | at the last rise of φ or before training | at the last rise of φ or the first validation |

    Buffer, φ and the loss to compare with are in every checkpoint.

    Args:
        initial_probability: φ at the start, in [0, 1].
        increment: what φ rises by, up to 1; 0 leaves it where it is.
        tolerance: how many nats per token the validation loss has to rise for that.
        capacity: texts in the buffer, over all ranks; the oldest give way.
        replay_schedule: how the share of new texts moves while the buffer is full.
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw from the k most probable tokens only; 0 draws from all.
        top_p: draw from the smallest set of tokens with this much probability.
        seed: of all draws; by default ``seed_everything``.

    Source: Ko et al. 2024, https://arxiv.org/abs/2402.03898, section 3.2; code: https://github.com/jongwooko/distillm.
    """

    speaker = "student"

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
    ) -> None:
        super().__init__(Decoding(max_new_tokens, temperature, top_k, top_p), seed)
        for name, value in (("initial_probability", initial_probability), ("increment", increment)):
            if not 0 <= value <= 1:
                raise ValueError(f"{KEY}.{name}: expected a number in [0, 1], got {value}.")
        if not tolerance >= 0:
            raise ValueError(f"{KEY}.tolerance: expected 0 or more nats, got {tolerance}.")
        if replay_schedule not in ("decreasing", "constant", "increasing"):
            raise ValueError(
                f"{KEY}.replay_schedule: expected decreasing, constant or increasing, got {replay_schedule!r}."
            )
        check_sizes(capacity=capacity)
        self.probability = initial_probability
        self.increment = increment
        self.tolerance = tolerance
        self.replay_schedule = replay_schedule
        self.texts: deque[Text] = deque(maxlen=capacity)
        self.capacity = capacity
        self.reference_loss: float | None = None
        self.dataset = DatasetResponses()

    def check_trainer(self, trainer: Any) -> None:
        """Refuse a run without the validation that moves φ, and a buffer that does not fill a batch."""
        data = trainer.datamodule
        if self.increment and not (trainer.limit_val_batches and getattr(data, "has_validation", True)):
            raise ValueError(
                "model.source: ReplayRollouts lets the student speak more often when the validation loss rises, and there is no "
                f"validation. Set data.init_args.validation or validation_size, or {KEY}.increment: 0 to keep "
                "initial_probability."
            )
        if trainer.max_steps == trainer.max_epochs == -1:
            raise ValueError(
                "model.source: ReplayRollouts has a schedule over the whole run, and the run has no end. Set trainer.max_steps or "
                "trainer.max_epochs."
            )
        if self.capacity < (batch_size := getattr(data, "batch_size", 1)):
            raise ValueError(
                f"{KEY}.capacity: {self.capacity} texts do not fill a batch of data.init_args.batch_size ({batch_size}). "
                "Make it larger."
            )

    def mini_batches(self, batch: Batch, players: Players) -> Iterator[Sequences]:
        """What the student answers, has answered before, or the dataset."""
        r = float(torch.rand((), generator=stream(self.seed, players.step, "replay")))
        filling = r < self.probability and len(self.texts) < self.capacity
        if filling or r < self.probability * self._new_share(players.step / players.total_steps()):
            for text in super().mini_batches(batch, players):
                self.texts += gather_texts(text, len(batch.ids), players)
                yield text
        elif r < self.probability:
            yield self._drawn(batch, players)
        else:
            yield from self.dataset.mini_batches(batch, players)

    def _new_share(self, progress: float) -> float:
        """Of the batches with the student's texts, the share in which they are new, once the buffer is full."""
        return {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self.replay_schedule]

    def _drawn(self, batch: Batch, players: Players) -> Sequences:
        """This rank's share of as many texts as the batch has items, drawn without replacement."""
        device = prompts_of(batch, self).input_ids.device
        count = int(players.sum_over_ranks(torch.tensor(len(batch.ids), device=device)))
        order = torch.randperm(len(self.texts), generator=stream(self.seed, players.step, "draw"))[:count]
        items = []
        for index in order[players.rank :: players.world_size].tolist():
            text = self.texts[index]
            ids = text.ids.tolist()
            items.append(Item("", ids[: text.prompt_length], ids[text.prompt_length :], [], ""))
        sequences = collate(items, pad_id=0, responses=True).sequences
        assert sequences is not None
        return sequences.to(device)

    def observe_validation(self, figures: Mapping[str, Tensor]) -> None:
        """Raise φ if the loss has risen."""
        if not self.increment:
            return
        if "loss" not in figures:
            raise ValueError(
                "data.init_args.validation: its items have no responses, so there is no validation loss to move the φ of "
                f"ReplayRollouts. Add responses, set data.init_args.responses: true, or {KEY}.increment: 0."
            )
        loss = float(figures["loss"])
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self.tolerance:
            self.probability = min(1.0, self.probability + self.increment)
            self.reference_loss = loss

    def figures(self) -> dict[str, float]:
        """φ, and how many texts the buffer holds."""
        return {"replay_probability": self.probability, "buffer_size": float(len(self.texts))}

    def state_dict(self) -> dict[str, Any]:
        """The buffer as one row of tokens and the lengths in it, φ, and the loss to compare with."""
        lengths = [[len(text.ids), text.prompt_length] for text in self.texts]
        return {
            "ids": torch.cat([torch.empty(0, dtype=torch.int32), *(text.ids for text in self.texts)]),
            "lengths": torch.tensor(lengths, dtype=torch.int32).view(-1, 2),
            "probability": self.probability,
            "reference_loss": self.reference_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with that buffer, φ and loss; a smaller capacity keeps the newest texts."""
        if not state:
            return
        sizes, prompt_lengths = state["lengths"].T.tolist()
        rows = state["ids"].split(sizes)
        self.texts.clear()
        self.texts.extend(map(Text, rows, prompt_lengths))
        self.probability = state["probability"]
        self.reference_loss = state["reference_loss"]


def gather_texts(text: Sequences, num_items: int, players: Players) -> list[Text]:
    """The texts of all ranks, in the order of the batch, of which rank r of W has every W-th from r on.

    Args:
        text: what this rank's prompts were answered.
        num_items: how many of its rows are items; the others count nowhere.
        players: this rank among the others.
    """
    attended, targets = text.attention_mask[:num_items].bool(), text.target_mask[:num_items]
    mine = slice(players.rank, None, players.world_size)
    count = players.sum_over_ranks(torch.tensor(num_items, device=attended.device))
    sizes = torch.zeros(int(count), 2, dtype=torch.int64, device=attended.device)
    sizes[mine] = torch.stack([attended.sum(dim=-1), (attended & ~targets).sum(dim=-1)], dim=-1)
    sizes = players.sum_over_ranks(sizes)
    columns = torch.arange(int(sizes[:, 0].max()), device=sizes.device)
    ids = torch.zeros(len(sizes), len(columns), dtype=torch.int64, device=sizes.device)
    ids[mine] = ids[mine].masked_scatter(columns < sizes[mine, :1], text.input_ids[:num_items][attended])
    rows = players.sum_over_ranks(ids).to("cpu", torch.int32)
    return [Text(row[:size].clone(), prompt) for row, (size, prompt) in zip(rows, sizes.tolist(), strict=True)]
