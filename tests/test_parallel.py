"""Models and checkpoints that are spread over two ranks are the same models and checkpoints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from processes import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lit_distill.checks import check_strategy
from lit_distill.models import ModelSpec
from lit_distill.models.spec import load_model
from lit_distill.parallel import AtomicCheckpointIO, FSDP2Strategy, read_checkpoint
from lit_distill.parallel.storage import save_sharded

MODELS = """
import sys
import torch
from torch.distributed.device_mesh import init_device_mesh
from unittest.mock import patch
from lit_distill.models import CausalLM, FrozenTeacher, ModelSpec
from lit_distill.models.pair import _Loading
from lit_distill.parallel import Sharding, gathered
from lit_distill.rollouts import Decoding, decode, loop, row_uniforms
from lit_distill.types import Prompts
from lightning.fabric.plugins.environments import LightningEnvironment

folder = sys.argv[1]
torch.distributed.init_process_group("gloo", rank=LightningEnvironment().local_rank(), world_size=2)
rank = torch.distributed.get_rank()
settings = dict(compute_dtype=None, offload_student=False, offload_teacher=False, gather_student=True, gather_teacher=False)
mesh = init_device_mesh("cpu", (2,))
sharding = Sharding(mesh, **settings)
found = {}

def load(spec, dtype=None, frozen=False, sharding=sharding):
    return _Loading(ModelSpec(**spec), "model.student", dtype, sharding).finish(None, frozen)

ids = torch.arange(10).view(2, 5) + 1
cases = {
    "untied": dict(path=f"{folder}/untied"), "tied": dict(path=f"{folder}/tied"), "in two files": dict(path=f"{folder}/cut"),
    "pruned": dict(path=f"{folder}/untied", keep_layers=[2, 0]), "bare GPT-2": dict(path=f"{folder}/gpt2"),
}
with patch("transformers.PreTrainedModel.from_pretrained", side_effect=AssertionError("a whole model was loaded")):
    for name, spec in cases.items():
        lm = load(spec, torch.float32)
        mine = sum(p.to_local().untyped_storage().nbytes() for p in lm.parameters())
        hidden = lm(ids, torch.ones_like(ids))
        found[name] = {
            "logits": lm.head().logits(hidden.flatten(0, 1)).detach(), "mine": mine,
            "whole": sum(p.numel() * 4 for p in lm.parameters()),
        }
    half = load(dict(path=f"{folder}/untied"), None, frozen=True)
    found["dtype of a teacher"] = str(next(half.parameters()).dtype), any(p.requires_grad for p in half.parameters())
    offloaded = Sharding(mesh, **{**settings, "offload_student": True})
    lm = load(cases["tied"], torch.float32, sharding=offloaded)
    loss = lm(ids, torch.ones_like(ids)).square().mean()
    loss.backward()
    found["offloaded"] = gathered(lm.model.model.norm.weight.grad, keep=True)

torch.manual_seed(7)
drawn = load(dict(path=f"{folder}/untied", from_scratch=True))
found["from scratch"] = gathered(drawn.model.lm_head.weight, keep=True).detach()

try:
    load(dict(path=f"{folder}/nan"))
except ValueError as error:
    found["nan"] = str(error)

prompts = torch.arange(12).view(4, 3) + 1
share = slice(rank * 2, rank * 2 + 2)  # the rows of rank 1 end earlier
uniforms = row_uniforms(3, [str(row) for row in range(4)], 24)[share]
loop.COMPACT_EVERY = 2
for name, gathers in {"gathered": True, "sharded": False}.items():
    speaker = load(cases["untied"], torch.float32, sharding=Sharding(mesh, **{**settings, "gather_student": gathers}))
    rows = Prompts(prompts[share], torch.ones_like(prompts[share]))
    said = decode(speaker, rows, Decoding(24), range(38, 41), uniforms)
    found[name] = said.ids[said.mask], said.logprobs[said.mask]
torch.save(found, f"{folder}/found-{rank}.pt")
"""


RUNS = """
import sys
from pathlib import Path
import lightning as L, torch
from lit_distill.callbacks import HuggingFaceExport, RunCheckpoint
from lit_distill.data import ProceduralData
from lit_distill.models import ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import PolicyGradient, ReverseKL
from lit_distill.parallel import FSDP2Strategy, gathered
from lit_distill.rollouts import TeacherMixedRollouts

student, teacher, devices, folder, *plans = sys.argv[1:]
folder = Path(folder)
for plan in plans:
    name, strategy, kind, start, precision, dtype = plan.split(",")
    L.seed_everything(1)
    if strategy == "fsdp2":
        strategy = FSDP2Strategy(save_distributed_checkpoint=kind == "folder")
    learner = DistillationModule(
        ModelSpec(student, dtype=dtype or None), {"long": PolicyGradient(), "single": ReverseKL()}, ModelSpec(teacher),
        TeacherMixedRollouts(alpha=0.3, max_new_tokens=5, mini_batch_size=4, inner_epochs=1, shuffle=False),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3), micro_batch_size=3,
    )
    checkpoint = RunCheckpoint(folder / name, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
    trainer = L.Trainer(
        default_root_dir=folder / name, accelerator="cpu", devices=int(devices), strategy=strategy, max_steps=6, logger=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, precision=precision,
        callbacks=[checkpoint, HuggingFaceExport()],
    )
    trainer.fit(learner, ProceduralData(num_train=32, num_validation=4, num_test=4, batch_size=8), ckpt_path=start or None)
    weights = gathered(dict(learner.student.named_parameters()), keep=True)
    if trainer.is_global_zero:
        whole = torch.cat([w.detach().flatten().float() for w in weights.values()])
        torch.save({"weights": whole, "loss": float(trainer.callback_metrics["train/loss"])}, folder / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models in every way that they may be stored."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(1)
    untied = tiny_llama(num_hidden_layers=3)
    untied.save_pretrained(folder / "untied")
    untied.save_pretrained(folder / "cut", max_shard_size="10KB")
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder / "tied")
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)).save_pretrained(
        folder / "gpt2"
    )
    weights = load_file(folder / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, folder / "gpt2" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        untied.lm_head.weight[-1, 0] = torch.nan  # in the shard of rank 1
    untied.save_pretrained(folder / "nan")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict]:
    script = folder / "models.py"
    script.write_text(MODELS)
    run_on_ranks(script, 2, folder)
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in (0, 1)]


SPECS = {
    "untied": {"path": "untied"},
    "tied": {"path": "tied"},
    "in two files": {"path": "untied"},
    "pruned": {"path": "untied", "keep_layers": [2, 0]},
    "bare GPT-2": {"path": "gpt2"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_shards_read_from_the_files_make_the_same_model_on_half_the_memory(found, folder, name) -> None:
    spec = SPECS[name]
    whole = load_model(ModelSpec(**{**spec, "path": str(folder / spec["path"])}), "model.student", torch.float32)
    expected = whole(input_ids=torch.arange(10).view(2, 5) + 1).logits.flatten(0, 1)
    for here in found:
        torch.testing.assert_close(here[name]["logits"], expected, rtol=1e-5, atol=1e-6)
        assert here[name]["mine"] < 0.54 * here[name]["whole"]  # a dimension that is odd is padded


@pytest.mark.slow
def test_a_frozen_model_keeps_the_dtype_of_its_files(found) -> None:
    assert all(here["dtype of a teacher"] == ("torch.float32", False) for here in found)


@pytest.mark.slow
def test_random_weights_are_those_that_one_process_draws(found, folder) -> None:
    torch.manual_seed(7)
    drawn = load_model(ModelSpec(str(folder / "untied"), from_scratch=True), "model.student")
    assert all(torch.equal(here["from scratch"], drawn.lm_head.weight) for here in found)


@pytest.mark.slow
def test_gradients_of_an_offloaded_student_are_those_of_a_whole_one(found, folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    model.model(torch.arange(10).view(2, 5) + 1).last_hidden_state.square().mean().backward()
    torch.testing.assert_close(found[0]["offloaded"], model.model.norm.weight.grad)


@pytest.mark.slow
def test_a_damaged_weight_stops_all_ranks(found) -> None:
    assert all("NaN or infinite weights in lm_head.weight" in here["nan"] for here in found)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gathered", "sharded"])
def test_ranks_that_end_at_different_times_say_what_one_process_says(found, folder, how) -> None:
    from lit_distill.models import CausalLM
    from lit_distill.rollouts import Decoding, decode, row_uniforms
    from lit_distill.types import Prompts

    whole = CausalLM(AutoModelForCausalLM.from_pretrained(folder / "untied"))
    prompts = torch.arange(12).view(4, 3) + 1
    uniforms = row_uniforms(3, [str(row) for row in range(4)], 24)
    said = decode(whole, Prompts(prompts, torch.ones_like(prompts)), Decoding(24), range(38, 41), uniforms)
    lengths = said.mask.sum(dim=-1)
    assert lengths[:2].max() > lengths[2:].max() + 4 or lengths[2:].max() > lengths[:2].max() + 4
    for rank, here in enumerate(found):
        rows = slice(rank * 2, rank * 2 + 2)
        assert torch.equal(here[how][0], said.ids[rows][said.mask[rows]])
        torch.testing.assert_close(here[how][1], said.logprobs[rows][said.mask[rows]], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory) -> Path:
    """Runs of six steps, and others that go on from their second step on other numbers of ranks, with or without shards."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "fit.py"
    script.write_text(RUNS)
    half = "step=2.ckpt"

    def plan(
        name: str, strategy: str, kind: str = "", start: object = "", precision: str = "32-true", dtype: str = ""
    ) -> str:
        return ",".join([name, strategy, kind, str(start), precision, dtype])

    run_on_ranks(script, 1, *pair, 1, folder, plan("one", "auto"))
    two = [
        plan("two", "fsdp2", "folder"),
        plan("two whole", "fsdp2", "file"),
        plan("two again", "fsdp2", "folder", folder / "two" / half),
        plan("two from file", "fsdp2", "folder", folder / "two whole" / half),
        plan("two from one", "fsdp2", "file", folder / "one" / half),
        plan("mixed", "fsdp2", "folder", precision="bf16-mixed"),
        plan("half", "fsdp2", "folder", dtype="bfloat16"),
    ]
    run_on_ranks(script, 2, *pair, 2, folder, *two)
    one = [
        plan("one from folder", "auto", "", folder / "two" / half),
        plan("one from file", "auto", "", folder / "two whole" / half),
        plan("one of shards from folder", "fsdp2", "folder", folder / "two" / half),
    ]
    run_on_ranks(script, 1, *pair, 1, folder, *one)
    return folder


def result(runs: Path, name: str) -> dict:
    return torch.load(runs / f"{name}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two again", "two from file"])
def test_two_ranks_go_on_exactly_as_if_they_had_never_stopped(runs, name) -> None:
    assert torch.equal(result(runs, name)["weights"], result(runs, "two")["weights"])
    assert result(runs, name)["loss"] == result(runs, "two")["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["two", "two from one", "one from folder", "one from file", "one of shards from folder"]
)
def test_a_run_goes_on_from_the_checkpoint_of_another_number_of_ranks(runs, name) -> None:
    torch.testing.assert_close(result(runs, name)["weights"], result(runs, "one")["weights"], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "half"])
def test_lower_precision_stays_near_full_precision(runs, name) -> None:
    difference = (result(runs, name)["weights"] - result(runs, "one")["weights"]).abs()
    assert 0 < difference.mean() < 0.02  # the weights have moved by up to 0.06


@pytest.mark.slow
def test_a_checkpoint_of_shards_has_everything_but_the_teacher(runs) -> None:
    one, two = (read_checkpoint(runs / name / "last.ckpt") for name in ("one", "two"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert not any("teacher" in name for name in two["state_dict"])
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=0, atol=2e-5)
    ours, theirs = (content["optimizer_states"][0]["state"] for content in (one, two))
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(theirs[0]["exp_avg"], ours[0]["exp_avg"], rtol=0, atol=1e-5)
    assert not list((runs / "two").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two whole", "one"])
def test_any_checkpoint_and_the_run_itself_become_the_same_folder(runs, name) -> None:
    path = Path(__file__).parents[1] / "tools" / "export_student.py"
    spec = importlib.util.spec_from_file_location("export_student", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.main([str(runs / name / "last.ckpt"), str(runs / name / "tool")])
    by_tool = AutoModelForCausalLM.from_pretrained(runs / name / "tool").state_dict()
    by_run = AutoModelForCausalLM.from_pretrained(runs / name / "export" / "last").state_dict()
    stored = read_checkpoint(runs / name / "last.ckpt")["state_dict"]
    for key, weight in by_tool.items():
        assert torch.equal(weight, by_run[key])
        assert torch.equal(weight, stored[f"student.model.{key}"])


def test_a_save_that_fails_leaves_the_last_good_checkpoint(tmp_path) -> None:
    store, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    store.save_checkpoint({"weights": torch.ones(3)}, path)
    with pytest.raises(AttributeError):
        store.save_checkpoint({"weights": torch.zeros(3), "broken": lambda: None}, path)
    assert torch.equal(store.load_checkpoint(path)["weights"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_written_anew_stays_good_until_the_new_one_is(tmp_path) -> None:
    path = tmp_path / "last.ckpt"
    save_sharded({"step": 1}, path, 0, lambda: None)
    full = patch("torch.save", side_effect=OSError("the disk is full"))
    with full, pytest.raises(OSError, match="full"):
        save_sharded({"step": 2}, path, 0, lambda: None)
    (path / "1-rank-00007.safetensors").write_bytes(b"of a run on more ranks that was cut off")
    assert read_checkpoint(path)["step"] == 1
    save_sharded({"step": 3}, path, 0, lambda: None)
    assert read_checkpoint(path)["step"] == 3
    assert sorted(file.name for file in path.iterdir()) == ["1-rank-00000.safetensors", "meta.pt"]
    AtomicCheckpointIO().save_checkpoint({"step": 4}, path)  # a file in the place of the folder
    assert read_checkpoint(path)["step"] == 4
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path)


def test_other_ways_to_cut_a_model_are_refused_with_what_to_use() -> None:
    class FSDPStrategy:
        pass

    with pytest.raises(ValueError, match=r"trainer\.strategy: FSDPStrategy .* Use fsdp2"):
        check_strategy(SimpleNamespace(strategy=FSDPStrategy()))
    check_strategy(SimpleNamespace(strategy=FSDP2Strategy()))


def test_mixed_precision_casts_shards_and_not_twice() -> None:
    strategy = FSDP2Strategy()
    strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    assert strategy.compute_dtype == torch.bfloat16
    with strategy.precision_plugin.forward_context():
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match=r"trainer\.precision: 16-mixed"):
        strategy.precision_plugin = MixedPrecision("16-mixed", "cpu")
