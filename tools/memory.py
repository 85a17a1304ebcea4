r"""Memory per GPU with `--trainer.strategy fsdp2`: computed for real model pairs, and measured to verify the formula.

python tools/memory.py
python tools/memory.py --together 8
python tools/memory.py --reference
python tools/memory.py --measure
python tools/memory.py --cache 10_000_000

With N ranks, a student of P_s parameters trained by AdamW in float32 and gathered in c bytes each, and a teacher of P_t
parameters stored and gathered in t bytes each, a rank always holds

    shards = (4 + 4 + 8)·P_s / N  [weights, gradients, two moments]  +  t·P_t / N

Models are gathered one group at a time: B is the largest decoder block, E the embeddings if the head is not tied to them, R the
rest (last norm, head, embeddings tied to it). R stays gathered, with its gradient, during the backward pass; torch gathers the
next block while one runs; the teacher's R stays gathered for its head. So in a training step a rank holds in addition at most

    c·(2·R_s + max(3·B_s, 2·E_s)) + t·R_t        or, in the teacher's forward,       t·(R_t + 2·max(B_t, E_t))

During rollouts the whole student is gathered once, and the teacher one block at a time:

    c·P_s + t·(R_t + 2·max(B_t, E_t))

``--reference`` adds a second frozen model (``model.reference``) of the student's shape: t·P_s / N to the shards, and t·R_s in the
backward pass. It runs after the teacher, whose R stays gathered:

    t·(R_t + R_s + 2·max(B_s, E_s))

With tensor parallelism over M ranks (``tensor_parallel_size``), each rank gathers 1/M of a block. So B, and the blocks of P_s in
the last line, are divided by M, and so are the activations and caches of a block; the shards do not change. If a single rank
holds a whole block, no block is gathered in advance.

``--measure`` measures the shards and the parameters gathered in a training step, on one and on two CPU processes. The computed
table adds the rest, for b sequences of T tokens per forward pass: float32 sums of the head's gradient (4·R_s), the reduction of the
largest group (4·max(R_s, B_s, E_s)), about 1 GB for chunks of logits, activations with gradient checkpointing (c·b·T·H_s for
each layer, and about c·b·T·(12·H_s + 4·I_s) inside one); for rollouts both KV caches, and t·b·T·H_t for the
teacher's hidden states.

``--cache TOKENS`` prints the size of a teacher cache (`lit-distill cache`) with so many targets, and what the run that reads it
keeps in memory of the teacher: its LM head for hidden states, nothing for the other forms.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from lit_distill.distributed import Sharding
from lit_distill.losses import ObjectiveEvaluator
from lit_distill.models import CausalLM
from lit_distill.models.fsdp import apply_fsdp, blocks_of
from lit_distill.models.spec import build_on_meta
from lit_distill.models.tensor_parallel import apply_tensor_parallel
from lit_distill.objectives import ExtrapolatedReverseKL, ForwardKL
from lit_distill.teachers import FrozenTeacher
from lit_distill.teachers.writing import CacheOptions
from lit_distill.types import Sequences

GB = 10**9
QWEN = {"vocab_size": 152064, "num_key_value_heads": 4}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
PAIRS: dict[str, tuple[PreTrainedConfig, PreTrainedConfig]] = {
    "Qwen2.5 7B -> 0.5B": (
        Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, **QWEN),
        Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            vocab_size=151936, tie_word_embeddings=True,
        ),
    ),
    "Llama 3.1 70B -> 8B": (
        LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA),
        LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA),
    ),
}  # fmt: skip
SMALL = {"num_attention_heads": 8, "vocab_size": 2048, "max_position_embeddings": 64}
STUDENT = LlamaConfig(hidden_size=384, intermediate_size=1024, num_hidden_layers=8, **SMALL)  # 16 million parameters
TEACHER = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=10, **SMALL)


@dataclass(frozen=True)
class Groups:
    """Number of parameters in each group that is gathered together."""

    total: int
    block: int
    embeddings: int
    rest: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Groups:
        """The groups that `lit_distill.models.fsdp` makes from a model with this config."""
        model = build_on_meta(config)
        embeddings = model.get_input_embeddings()
        sizes = {block: sum(p.numel() for p in block.parameters()) for block in blocks_of(model)}
        apart = sizes.pop(embeddings, 0)
        total = sum(p.numel() for p in model.parameters())
        return cls(total, max(sizes.values()), apart, total - apart - sum(sizes.values()))

    def among(self, together: int) -> Groups:
        """The share of one rank with tensor parallelism over ``together`` ranks."""
        ends = self.embeddings + self.rest
        return replace(self, total=ends + (self.total - ends) // together, block=self.block // together)


def shards(student: Groups, teacher: Groups, ranks: int, t: int, reference: bool = False) -> float:
    """Bytes that a rank always holds."""
    return ((16 + t * reference) * student.total + t * teacher.total) / ranks


def learning(student: Groups, teacher: Groups, c: int, t: int, reference: bool = False) -> int:
    """Maximum of gathered bytes during a training step."""
    heads = t * (teacher.rest + reference * student.rest)
    backward = c * (2 * student.rest + max(3 * student.block, 2 * student.embeddings)) + heads
    forwards = [t * (teacher.rest + 2 * max(teacher.block, teacher.embeddings))]
    if reference:
        forwards.append(heads + 2 * t * max(student.block, student.embeddings))
    return max(backward, *forwards)


def rollouts(student: Groups, teacher: Groups, c: int, t: int) -> int:
    """Maximum of gathered bytes during mixed rollouts."""
    return c * student.total + t * (teacher.rest + 2 * max(teacher.block, teacher.embeddings))


def on_paper(name: str, ranks: int, texts: int, length: int, together: int = 1, reference: bool = False) -> None:
    """Print the computed memory for a pair: bfloat16, with float32 for the trained parameters."""
    shapes = PAIRS[name]
    sizes = [Groups.of(config) for config in shapes]
    teacher, student = (size.among(together) for size in sizes)
    p, q = shapes
    tokens = texts * length
    learn = (
        learning(student, teacher, 2, 2, reference)
        + 4 * student.rest
        + 4 * max(student.rest, student.block, student.embeddings)
    )
    inside = (12 * q.hidden_size + 4 * q.intermediate_size) // together
    activations = 2 * tokens * (q.hidden_size * q.num_hidden_layers + inside) + 1 * GB
    caches = sum(
        2
        * 2
        * tokens
        * config.num_hidden_layers
        * config.num_key_value_heads
        * config.hidden_size
        // config.num_attention_heads
        // together
        for config in shapes
    )
    write = rollouts(student, teacher, 2, 2) + caches + 2 * tokens * p.hidden_size
    teacher, student = sizes
    fixed = shards(student, teacher, ranks, 2, reference)
    second = f", reference {2 * student.total / ranks / GB:.1f}" if reference else ""
    how = f", tensor parallel over {together}" if together > 1 else ""
    print(f"{name}, {ranks} GPUs{how}, {texts} sequences of {length} tokens per forward pass, in GB per GPU:")
    print(
        f"  shards: student {16 * student.total / ranks / GB:.1f}, teacher {2 * teacher.total / ranks / GB:.1f}{second}"
    )
    print(f"  learning: {fixed / GB:.1f} + gathered and reduced {learn / GB:.1f} + activations {activations / GB:.1f}"
          f" = {(fixed + learn + activations) / GB:.1f}")  # fmt: skip
    print(
        f"  rollouts: {fixed / GB:.1f} + gathered, caches and hidden states {write / GB:.1f} = {(fixed + write) / GB:.1f}"
    )


def print_cache(name: str, tokens: int) -> None:
    """Print bytes a token, and the size on the disk, of the three forms of a teacher cache."""
    teacher, _ = PAIRS[name]
    print(f"{name}, teacher cache of {tokens:,} targets; V = {teacher.vocab_size:,}, H = {teacher.hidden_size:,}:")
    forms = (CacheOptions("hidden"), CacheOptions("topk", top_k=64), CacheOptions("sampled", num_draws=50))
    for options in forms:
        each = options.bytes_per_row(teacher.vocab_size, teacher.hidden_size, torch.bfloat16)
        head = 2 * teacher.vocab_size * teacher.hidden_size / GB if options.form == "hidden" else 0.0
        most = "at most " if options.form == "sampled" else ""
        size = each * tokens / GB
        print(f"  {options.form}: {most}{each:,.0f} bytes a token, {size:.1f} GB on the disk; {head:.1f} GB in memory")


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' local memory on this rank; shared storage counts once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


class Gathered(TorchDispatchMode):
    """Tracks the peak bytes of gathered parameters (also those being gathered) and of their gradients, at each operation."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = models
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Update the peak, then run the operation."""
        there = [p for model in self.models for p in model.parameters()]
        whole = [p for p in there if not isinstance(p, DTensor) or p.device_mesh.mesh_dim_names == ("tensor",)]
        parts = [part for model in self.models for part in model.modules() if isinstance(part, FSDPModule)]
        coming = [group._all_gather_result for part in parts if (group := part._get_fsdp_state()._fsdp_param_group)]
        ahead = [result.all_gather_output for result in coming if result is not None]
        self.peak = max(self.peak, num_bytes([*ahead, *(t for p in whole for t in (p, p.grad) if t is not None)]))
        return func(*args, **(kwargs or {}))


def measure(rank: int, ranks: int, together: int, reference: bool, meeting: str) -> None:
    """Do a training step of small models on one rank; rank 0 prints the memory it held."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (ranks // together, together), mesh_dim_names=("data", "tensor"))
    plan = Sharding(mesh["data"], None, False, False, True, False)
    shapes = (STUDENT, TEACHER, *[STUDENT] * reference)
    student, *frozen = (CausalLM(AutoModelForCausalLM.from_config(config)) for config in shapes)
    if together > 1:
        plan = replace(plan, tensor_mesh=mesh["tensor"], world_mesh=mesh._flatten("world"))
        for model, key in zip((student, *frozen), ("model.student", "model.teacher", "model.reference"), strict=False):
            apply_tensor_parallel(model.model, mesh["tensor"], key)
    apply_fsdp(student, student.model, plan, frozen=False)
    for model in frozen:
        apply_fsdp(model.requires_grad_(False), model.model, plan, frozen=True)
    optimizer = torch.optim.AdamW(student.parameters())
    ids = torch.randint(0, STUDENT.vocab_size, (2, 32))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    text = Sequences(ids, torch.ones_like(ids), targets)
    objective = ExtrapolatedReverseKL() if reference else ForwardKL()
    teacher, second = FrozenTeacher(frozen[0]), FrozenTeacher(frozen[1]) if reference else None
    loss = ObjectiveEvaluator({"kd": objective}, student, teacher, "model.objectives", reference=second)
    with Gathered(student, *frozen) as watch:
        loss(text, {"kd": 1.0})[0].backward()
    optimizer.step()
    for part in (part for model in frozen for part in model.modules()):
        if reshard := getattr(part, "reshard", None):
            reshard()
    parameters = list(student.parameters())
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*parameters, *(p.grad for p in parameters), *states, *(p for model in frozen for p in model.parameters())]
    mine = num_bytes(held)
    if rank == 0:
        sizes = Groups.of(STUDENT), Groups.of(TEACHER)
        split = [size.among(together) for size in sizes]
        expected = shards(*sizes, ranks, 4, reference), learning(*split, 4, 4, reference)
        how = ", tensor parallel" if together > 1 else ""
        print(f"{ranks} rank(s){how}: shards {mine / 1e6:.1f} MB (formula {expected[0] / 1e6:.1f}), gathered at most "
              f"{watch.peak / 1e6:.1f} MB (formula {expected[1] / 1e6:.1f}), together {(mine + watch.peak) / 1e6:.1f} MB "
              f"(formula {sum(expected) / 1e6:.1f})")  # fmt: skip
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure",
        type=int,
        nargs="*",
        metavar="RANKS",
        help="measure on so many CPU processes instead; 1 and 2 by default",
    )
    parser.add_argument("--ranks", type=int, default=8, help="number of GPUs in the computed table")
    parser.add_argument(
        "--together", type=int, default=1, help="GPUs of one tensor-parallel group in the computed table"
    )
    parser.add_argument("--reference", action="store_true", help="with model.reference, of the student's shape")
    parser.add_argument("--texts", type=int, default=8, help="sequences per forward pass")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sequence")
    parser.add_argument("--cache", type=int, metavar="TOKENS", help="targets of a teacher cache whose size to print")
    given = parser.parse_args(arguments)
    if given.cache is not None:
        for name in PAIRS:
            print_cache(name, given.cache)
        return
    if given.measure is None:
        for name in PAIRS:
            on_paper(name, given.ranks, given.texts, given.length, given.together, given.reference)
        return
    for ranks in given.measure or (1, 2):
        for together in {1, ranks}:
            with tempfile.TemporaryDirectory() as folder:
                start = (
                    "fork" if sys.platform == "linux" else "spawn"
                )  # forked processes need not import everything again
                settings = (ranks, together, given.reference, f"{folder}/meeting")
                torch.multiprocessing.start_processes(measure, settings, nprocs=ranks, start_method=start)


if __name__ == "__main__":
    main()
