"""``--trainer.strategy fsdp2``: shards student and teacher, block by block, with torch's `fully_shard`.

Lightning's `ModelParallelStrategy` provides processes, device mesh and hooks. This module adds the layout of the ranks (data
parallel, optionally with tensor parallelism), ``trainer.precision`` for shards, and checkpoints that any number of ranks can load.
The models are sharded when they are loaded, in `lit_distill.models`.
"""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_distill.distributed.checkpoint import AtomicCheckpointIO, gathered, save_sharded
from lit_distill.distributed.gradients import ShardPrecision
from lit_distill.distributed.ranks import DataRanks
from lit_distill.distributed.sharding import Sharding
from lit_distill.distributed.stored import load_into, open_checkpoint
from lit_distill.types import ArgumentError

NAME = "fsdp2"


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism of student and teacher, for all methods; short name ``fsdp2``.

    Each decoder block is gathered when it runs and freed afterwards; the rest of the model likewise. Gradients are reduced in
    float32 after each micro-batch, so that only shards of them are stored. No rank loads a whole model: it is built without
    weights, and each rank reads its own part of the safetensors files.

    Args:
        tensor_parallel_size: number of ranks that process the same examples and split the heads and columns of each decoder block;
            on GPUs, they must be in one machine. It must divide the number of ranks.
        gather_student: during generation, keep the whole student on each device instead of gathering each block for each token.
            Set false if it does not fit.
        gather_teacher: the same for the teacher.
        offload_student: keep the student's weights, gradients and optimiser state in CPU memory; the optimiser step runs there.
        offload_teacher: keep the teacher's weights in CPU memory.
        save_distributed_checkpoint: true: a checkpoint is a folder into which each rank writes its shards; false: it is gathered
            into one file. Any number of ranks can load either, with this strategy or another.
        process_group_backend: backend of torch.distributed; by default nccl on GPUs and gloo on CPUs.
        timeout: time after which a rank stops waiting for another and raises an error.

    Raises:
        ValueError: if torch is too old.
    """

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        gather_student: bool = True,
        gather_teacher: bool = False,
        offload_student: bool = False,
        offload_teacher: bool = False,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise ValueError(
                f"trainer.strategy: {NAME} needs torch 2.8 or newer, but {torch.__version__} is installed. Update torch or use ddp."
            )
        self.tensor_parallel_size = tensor_parallel_size
        self.gather_student = gather_student
        self.gather_teacher = gather_teacher
        self.offload_student = offload_student
        self.offload_teacher = offload_teacher
        self.compute_dtype: torch.dtype | None = None
        self.sharding: Sharding | None = None
        """Settings for loading and running the models; set by `setup_environment`."""
        self.data_ranks: DataRanks | None = None
        """This rank's share of a batch; set by `setup_environment`."""
        self.checkpoint_io = AtomicCheckpointIO()
        self._hooks: list[Any] = []
        self._loaded_from: Path | None = None

    @property
    def precision_plugin(self) -> Precision:
        """The plugin for ``trainer.precision``."""
        return self._precision_plugin or ShardPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, MixedPrecision):
            if plugin.scaler is not None:
                raise ValueError(
                    f"trainer.precision: {plugin.precision} is not supported by {NAME}. Use bf16-mixed or 32-true."
                )
            self.compute_dtype = torch.bfloat16
            plugin = ShardPrecision("bf16-mixed")
        elif type(plugin) is Precision:
            plugin = ShardPrecision(plugin.precision)
        self._precision_plugin = plugin

    def setup_environment(self) -> None:
        """Start the processes, and set `sharding` and `data_ranks`.

        Raises:
            ValueError: if ``tensor_parallel_size`` does not divide the number of ranks.
        """
        ranks, size = self.num_nodes * self.num_processes, self.tensor_parallel_size
        if size < 1:
            raise ArgumentError(self, f"tensor_parallel_size: expected at least 1, got {size}.")
        if ranks % size:
            raise ArgumentError(
                self,
                f"tensor_parallel_size: {size} does not divide the {ranks} ranks. Set trainer.devices to a multiple of it.",
            )
        self._data_parallel_size, self._tensor_parallel_size = ranks // size, size
        super().setup_environment()
        atexit.register(_destroy_process_group)  # otherwise threads of gloo outlive the interpreter, and may abort it
        data, tensor = self.device_mesh["data_parallel"], self.device_mesh["tensor_parallel"]
        share = data.get_local_rank()
        self.data_ranks = DataRanks(share, ranks // size, data.get_group(), is_replica=tensor.get_local_rank() > 0)
        self.sharding = Sharding(
            mesh=data,
            tensor_mesh=tensor if size > 1 else None,
            world_mesh=self.device_mesh._flatten("world") if size > 1 else None,
            compute_dtype=self.compute_dtype,
            offload_student=self.offload_student,
            offload_teacher=self.offload_teacher,
            gather_student=self.gather_student,
            gather_teacher=self.gather_teacher,
        )

    def _get_process_group_backend(self) -> str:
        backend: str = super()._get_process_group_backend()
        on_both = self.offload_student and backend == "nccl"  # the norm of gradients on the CPU is reduced by gloo
        return "cuda:nccl,cpu:gloo" if on_both else backend

    def setup(self, trainer: Any) -> None:
        """Free what an earlier fit gathered, and create the optimisers.

        Trained parameters that are not sharded, such as an objective's own, get hooks that average their gradients over ranks.
        """
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for hook in self._hooks:
            hook.remove()
        parameters = self.lightning_module.parameters()
        unsharded = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        self._hooks = [parameter.register_hook(self._average) for parameter in unsharded]
        super().setup(trainer)

    def _average(self, gradient: Tensor) -> Tensor:
        assert self.data_ranks is not None
        average = gradient / self.data_ranks.number
        torch.distributed.all_reduce(average, group=self.data_ranks.group)
        return average

    def model_to_device(self) -> None:
        """Move modules without shards to the device; shards are already in place."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
                module.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's shards, as DTensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's shards, as DTensors."""
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write all shards atomically: under a temporary name, which is changed at the end."""
        if storage_options is not None:
            raise ValueError(f"trainer.strategy: {NAME} writes to a file system and does not support storage_options.")
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            save_sharded(checkpoint, path, self.global_rank, self.barrier)
            return
        checkpoint = gathered(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this rank's part of the weights from a checkpoint written by any number of ranks."""
        assert self.lightning_module is not None
        self._loaded_from = Path(self.broadcast(str(checkpoint_path)))
        with open_checkpoint(self._loaded_from) as stored:
            load_into(stored, self.lightning_module.state_dict(), self.lightning_module.strict_loading)
            return stored.rest

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning restores the optimiser after the hooks, which may change the checkpoint."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's tensors from the checkpoint file loaded last, and the parameter groups from ``checkpoint``."""
        states = checkpoint["optimizer_states"]
        assert self._loaded_from is not None
        with open_checkpoint(self._loaded_from) as stored:
            for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=False)):
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                here = stored.optimizer_state(index, parameters)
                optimizer.load_state_dict({**here, "param_groups": state["param_groups"]})


def _destroy_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, FSDP2Strategy, description="student and teacher sharded over all ranks")
