"""``lit-distill cache``: runs the teacher once over the data of a config, and writes what it predicts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_distill.cli.storable import check_storable
from lit_distill.data.encoding import tokenizer_content
from lit_distill.data.instructions import FALLBACK_SPLITS
from lit_distill.distributed import data_ranks, max_over_ranks, sharding_of
from lit_distill.files import LOCK_FILE, acquire_lock, release_lock
from lit_distill.models.lm_head import LMHead
from lit_distill.models.roles import device_and_precision
from lit_distill.models.spec import load_config
from lit_distill.teachers import FrozenTeacher, LocalTeacher, Opening, Teacher
from lit_distill.teachers.prompted import PromptedTeacher
from lit_distill.teachers.store import CacheSettings, Shards
from lit_distill.teachers.writing import CacheOptions, CacheWriter, Progress, check_folder, prepare, write_head
from lit_distill.types import ArgumentError, Batch, arguments_of
from lit_distill.validation import check_lengths, check_tokens, check_writable

if TYPE_CHECKING:
    from lit_distill.module import DistillationModule


STAGES = {"train": TrainerFn.FITTING, "validation": TrainerFn.FITTING, "test": TrainerFn.TESTING}
"""The stage for which a data module loads each split."""
OF_WEIGHTS = frozenset({"hidden_size", "dtype", "scale", "softcap"})
"""Settings of a cache that are known once the teacher is loaded."""


class CacheData(L.LightningDataModule):
    """Every item of some splits of a data module, once.

    Args:
        data: the data module of the config.
        splits: names of splits.
    """

    def __init__(self, data: Any, splits: Sequence[str]) -> None:
        super().__init__()
        if not hasattr(data, "every_item"):
            raise ValueError(
                f"data: {type(data).__name__} has no method every_item, so its items cannot be cached. Use InstructionData."
            )
        if others := [split for split in splits if split not in STAGES]:
            raise ValueError(f"splits: expected some of {', '.join(STAGES)}, got {others[0]!r}.")
        self.data = data
        self.splits = list(dict.fromkeys(splits))
        self.stages = dict.fromkeys(STAGES[split] for split in self.splits)

    def prepare_data(self) -> None:
        """Prepare the splits as for the stages that use them."""
        self.data.trainer = self.trainer
        state = self.trainer.state  # type: ignore[union-attr]
        asked = state.fn
        for stage in self.stages:
            state.fn = stage  # which tells a data module what to prepare
            self.data.prepare_data()
        state.fn = asked

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that the config has.

        Raises:
            ValueError: if it has none of them.
        """
        self.data.trainer = self.trainer
        for part in self.stages:
            if part is not TrainerFn.TESTING or self._has_test():
                self.data.setup(part.value)
        if not self.found:
            raise ValueError(f"splits: the data has no items in {', '.join(self.splits)}.")

    def _has_test(self) -> bool:
        """Whether there are items to test on, which may be those to validate on; a data module raises an error if not."""
        read = getattr(self.data, "read_split", None)
        if read is None or getattr(self.data, "validation_size", False):
            return True
        return any(read(split) is not None for split in ("test", FALLBACK_SPLITS["test"]))

    @property
    def found(self) -> list[str]:
        """The splits that there are."""
        return [split for split in self.splits if self.data.num_items(split)]

    def predict_dataloader(self) -> list[DataLoader[Batch]]:
        """A loader for each split."""
        return [self.data.every_item(split) for split in self.found]


class CacheRun(L.LightningModule):
    """Runs the teacher of a config over all items; the student is not loaded.

    Args:
        module: the module of the config.
        folder: of the cache.
        options: what to store.
    """

    def __init__(self, module: DistillationModule, folder: Path, options: CacheOptions) -> None:
        super().__init__()
        teacher = module.teacher_config
        if teacher is None:
            raise ValueError("teacher: there is none to cache. Set model.teacher.path.")
        check_storable(teacher, options)
        if options.form == "hidden" and not isinstance(_behind_prompts(teacher), LocalTeacher):
            raise ArgumentError(
                self,
                "form: hidden needs a local model as the teacher. Choose form: topk or sampled, or set model.teacher.path.",
            )
        check_writable(folder, "path")
        self.module = [module]  # in a list, so that it is no part of this module
        self.teacher_config: Teacher = teacher
        self.folder = folder
        self.options = options
        self.writer: CacheWriter | None = None

    @property
    def tokenizer(self) -> Any:
        """The student's, which tokenises the data."""
        return self.module[0].tokenizer

    @property
    def item_fields(self) -> frozenset[str]:
        """The fields of the records that the teacher needs."""
        return self.teacher_config.fields

    def setup(self, stage: str) -> None:
        """Check lengths and tokens before any weights load."""
        _check_limits(self.trainer)
        module = self.module[0]
        with self._data_of(module) as data, arguments_of(module):
            if not getattr(data.data, "responses", True):
                raise ValueError("data.init_args.responses: the data has no responses to cache. Set it to true.")
            for part in data.stages:
                check_lengths(module, part.value)
            check_tokens(module)

    @contextmanager
    def _data_of(self, module: DistillationModule) -> Iterator[CacheData]:
        """Inside, the Trainer has the data module of the config, and the module of the config has the Trainer."""
        data: CacheData = self.trainer.datamodule  # type: ignore[attr-defined]
        module.trainer = self.trainer
        self.trainer.datamodule = data.data  # type: ignore[attr-defined]
        try:
            yield data
        finally:
            self.trainer.datamodule = data  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Load the teacher."""
        if self.writer is not None:
            return
        module, data = self.module[0], self.trainer.datamodule  # type: ignore[attr-defined]
        device_type, _ = device_and_precision(self)
        rows = load_config(module.student_spec, "model.student").get_text_config(decoder=True).vocab_size
        opening = Opening(
            self.tokenizer, module.student_spec, rows, device_type, sharding_of(self), module.padding_free
        )
        with arguments_of(module):
            size = self.teacher_config.open(opening, "teacher") or rows
            settings = self._settings(size, data)
            self._on_rank_zero(lambda: check_folder(self.folder, settings, unknown=OF_WEIGHTS))
            teacher = self.teacher_config.load(size, None)
        head = None
        if self.options.form == "hidden":
            local = teacher.loaded if isinstance(teacher, PromptedTeacher) else teacher
            assert isinstance(local, FrozenTeacher)
            head = local.lm.head()  # a collective if it is sharded
            dtype = self.options.dtype or next(local.lm.parameters()).dtype
            settings = replace(
                settings,
                hidden_size=head.weight.shape[1],
                dtype=str(dtype).removeprefix("torch."),
                scale=head.scale,
                softcap=head.softcap,
            )
        self._begin(settings, head, data)
        ranks = data_ranks(self.trainer)
        self.writer = CacheWriter(self.folder, self.options, teacher, settings, ranks.rank, writes=not ranks.is_replica)
        self.trainer.strategy.barrier("teacher cache is read")

    def _settings(self, size: int, data: CacheData) -> CacheSettings:
        """What is known before the weights are."""
        options = self.options
        if options.form == "topk" and options.top_k > size:
            raise ValueError(f"top_k: expected at most {size}, the number of tokens, got {options.top_k}.")
        return CacheSettings(
            form=options.form,
            vocabulary_size=size,
            teacher=self.teacher_config.description,
            identity=self.teacher_config.identity("model.teacher"),
            tokenizer=tokenizer_content(self.tokenizer),
            data=", ".join(f"{data.data.num_items(split)} items of {split}" for split in data.found),
            top_k=options.top_k if options.form == "topk" else 0,
            num_draws=options.num_draws if options.form == "sampled" else 0,
            seed=options.seed,
            fields=sorted(self.teacher_config.fields),
        )

    def _begin(self, settings: CacheSettings, head: LMHead | None, data: CacheData) -> None:
        tokens = sum(data.data.num_targets(split) for split in data.found)
        dtype = getattr(torch, settings.dtype)
        each = self.options.bytes_per_row(settings.vocabulary_size, settings.hidden_size, dtype)
        items = sum(data.data.num_items(split) for split in data.found)
        rank_zero_info(
            f"Teacher cache {self.folder}: {settings.data}, at most {tokens} tokens of {each:.0f} bytes: "
            f"{tokens * each / 2**20:.1f} MiB."
        )
        self.settings = self._on_rank_zero(lambda: self._started(settings, head, tokens * each)) or settings
        self.progress = Progress(-(-items // data_ranks(self.trainer).number))

    def _on_rank_zero(self, action: Callable[[], CacheSettings | None]) -> CacheSettings | None:
        """What rank 0 finds in the folder, where others would find a file half written; every rank raises its error."""
        found, problem = None, None
        if self.trainer.is_global_zero:
            try:
                found = action()
            except (ValueError, OSError) as error:
                problem = error
        found, problem = self.trainer.strategy.broadcast((found, problem))
        if problem is not None:
            raise problem
        return found

    def _started(self, settings: CacheSettings, head: LMHead | None, num_bytes: float) -> CacheSettings:
        if not acquire_lock(self.folder / LOCK_FILE):
            raise ValueError(
                f"path: another process is writing the cache {self.folder}. Wait until it ends, or give another folder."
            )
        try:
            settings = prepare(self.folder, settings, num_bytes)
            if head is not None:
                write_head(self.folder, head)
        except BaseException:
            release_lock(self.folder / LOCK_FILE)
            raise
        return settings

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Write the texts of a batch that are not in the cache; returns their number."""
        assert self.writer is not None
        if batch.sequences is None:
            raise ValueError("data.init_args.responses: the data has no responses to cache. Set it to true.")
        with arguments_of(self.module[0]):
            missing = self.writer.missing(batch.sequences)
            if max_over_ranks(self, len(missing)):
                self.writer.write(batch.sequences, missing)
        self.progress.add(len(batch))
        return len(missing)

    def on_predict_end(self) -> None:
        """Write the last shard; the cache is complete once every rank has."""
        assert self.writer is not None
        self.writer.flush()
        self.trainer.strategy.barrier("teacher cache")
        if self.trainer.is_global_zero:
            found = Shards(self.folder)
            replace(self.settings, complete=True).write(self.folder)
            release_lock(self.folder / LOCK_FILE)
            each = found.num_bytes / max(found.total_rows, 1)
            rank_zero_info(
                f"Teacher cache {self.folder}: {len(found)} texts, {found.total_rows} tokens, {found.num_bytes / 2**20:.1f} MiB, "
                f"{each:.1f} bytes a token. Train with --model.teacher CachedTeacher --model.teacher.path "
                f"{shlex.quote(str(self.folder))}"
            )


def _behind_prompts(teacher: Teacher) -> Teacher:
    return teacher.teacher if isinstance(teacher, PromptedTeacher) else teacher


def _check_limits(trainer: Any) -> None:
    """Refuse options of the Trainer that leave out items.

    Raises:
        ValueError: with the key.
    """
    limit = trainer.limit_predict_batches
    if not (isinstance(limit, float) and limit == 1):
        key = "fast_dev_run" if trainer.fast_dev_run else "limit_predict_batches"
        raise ValueError(f"trainer.{key}: a cache needs every item. Remove it, or set fewer items in data.init_args.")
