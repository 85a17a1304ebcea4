"""Two processes write the cache that one writes, and learn from it what one learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from caches import assert_same, cache, distinct_teacher, live, num_texts, small_data, values_of
from processes import run_on_ranks

from lit_distill.teachers.store import CacheSettings

pytestmark = pytest.mark.slow
SCRIPT = """
import os
import sys
import time
sys.path += sys.argv[1].split(":")
import torch
from caches import QUIET, from_cache, live, small_data
from lit_distill import files
from lit_distill.cli.caching import CacheRun
from lit_distill.cli.trainer import DistillTrainer
from lit_distill.distributed import FSDP2Strategy, gathered

student, teacher, folder, strategy, devices, what, out = sys.argv[2:]
together = 2 if strategy == "fsdp2, tensor-parallel" else 1

def trainer(**settings):
    chosen = FSDP2Strategy(tensor_parallel_size=together) if strategy.startswith("fsdp2") else strategy
    return DistillTrainer(**QUIET, devices=int(devices), strategy=chosen, **settings)

if what == "late":
    what = "hidden"
    if os.environ["LOCAL_RANK"] == "0":
        commit = files.commit
        files.commit = lambda *paths: (time.sleep(4), commit(*paths))  # an unfinished file lies in the folder meanwhile
    else:
        settings = CacheRun._settings
        CacheRun._settings = lambda *given: (time.sleep(2), settings(*given))[1]
if what in ("hidden", "topk", "sampled"):
    trainer().cache(live((student, teacher)), small_data(num_train=45), path=folder, form=what, splits=("train", "validation"))
else:
    module = from_cache(student, folder, micro_batch_size=3)
    run = trainer(max_steps=8, num_sanity_val_steps=0)
    run.fit(module, small_data(num_train=45))
    metrics = {name: float(value) for name, value in run.callback_metrics.items()}
    state = gathered(dict(module.named_parameters()), keep=True)
    if run.is_global_zero:
        torch.save({"weights": torch.cat([p.detach().flatten() for p in state.values()]), "metrics": metrics}, out)
"""


@pytest.fixture(scope="module")
def sharp(pair, tmp_path_factory) -> tuple[Path, Path]:
    return pair[0], distinct_teacher(pair[1], tmp_path_factory.mktemp("sharp") / "teacher")


@pytest.fixture(scope="module")
def ranks(sharp, tmp_path_factory):
    """Writes a cache, or trains from one, on some ranks."""
    script = tmp_path_factory.mktemp("ranks") / "ranks.py"
    script.write_text(SCRIPT)
    here = Path(__file__).parent

    def go(folder: Path, strategy: str, number: int, what: str, out: Path) -> None:
        run_on_ranks(script, number, f"{here}:{here.parent}", *sharp, folder, strategy, number, what, out)

    return go


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2, tensor-parallel"])
@pytest.mark.parametrize("form", ["hidden", "topk", "sampled"])
def test_two_ranks_write_what_one_writes(ranks, sharp, tmp_path, strategy, form) -> None:
    one, two = cache(live(sharp), tmp_path / "one", small_data(num_train=45), form=form), tmp_path / "two"
    ranks(two, strategy, 2, form, tmp_path / "out")
    assert CacheSettings.read(one, "path") == CacheSettings.read(two, "path")
    assert_same(values_of(one), values_of(two))
    assert num_texts(two) == 55
    assert {file.name for file in two.iterdir()} == {file.name for file in one.iterdir()}
    writers = {file.name.split("-")[0] for file in (two / "shards").iterdir()}
    assert writers == ({"0"} if "tensor" in strategy else {"0", "1"})


def test_a_rank_that_is_late_finds_a_cache_half_begun(ranks, sharp, tmp_path) -> None:
    ranks(tmp_path / "c", "ddp", 2, "late", tmp_path / "out")
    assert num_texts(tmp_path / "c") == 55


def test_one_rank_goes_on_where_two_stopped(ranks, sharp, tmp_path) -> None:
    ranks(tmp_path / "c", "ddp", 2, "hidden", tmp_path / "out")
    cache(live(sharp), tmp_path / "c", small_data(num_train=45), splits=("train", "validation", "test"))
    whole = cache(live(sharp), tmp_path / "one", small_data(num_train=45), splits=("train", "validation", "test"))
    assert_same(values_of(tmp_path / "c"), values_of(whole))


@pytest.mark.parametrize(
    ("form", "strategy"), [("hidden", "ddp"), ("topk", "ddp"), ("sampled", "ddp"), ("hidden", "fsdp2")]
)
def test_two_ranks_learn_from_a_cache_what_one_learns(ranks, sharp, tmp_path, form, strategy) -> None:
    folder = cache(live(sharp), tmp_path / "c", small_data(num_train=45), form=form)
    found = []
    for chosen, number in (("auto", 1), (strategy, 2)):
        ranks(folder, chosen, number, "fit", tmp_path / f"{number}.pt")
        found.append(torch.load(tmp_path / f"{number}.pt", weights_only=True))
    torch.testing.assert_close(found[1]["weights"], found[0]["weights"], rtol=0, atol=1e-6)
    assert found[1]["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-5, abs=1e-6)
