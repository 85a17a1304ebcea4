"""Students that are sharded over two ranks are exported as they are, and a wrong export is found on the rank that writes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from transformers import AutoModelForCausalLM

SCRIPT = """
import sys
from pathlib import Path
from unittest.mock import patch
import lightning as L, torch
from transformers import PreTrainedModel
from lit_distill.callbacks import HuggingFaceExport
from lit_distill.data import ProceduralData
from lit_distill.models import LoraSpec, ModelSpec
from lit_distill.module import DistillationModule
from lit_distill.objectives import NextToken
from lit_distill.distributed import FSDP2Strategy, gathered

student, folder = sys.argv[1], Path(sys.argv[2])
lora = LoraSpec(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"])
cases = {"plain": (None, {}), "merged": (lora, {}), "adapter": (lora, {"merge_lora": False}), "wrong": (None, {})}
right = PreTrainedModel.save_pretrained

def wrong(model, place, state_dict, **settings):
    right(model, place, state_dict={**state_dict, "model.norm.weight": state_dict["model.norm.weight"] * 2}, **settings)

for name, (adapters, settings) in cases.items():
    L.seed_everything(1)
    learner = DistillationModule(
        ModelSpec(student, lora=adapters), {"ce": NextToken()}, optimizer=lambda p: torch.optim.AdamW(p, lr=0.03)
    )
    trainer = L.Trainer(
        default_root_dir=folder / name, accelerator="cpu", devices=2, strategy=FSDP2Strategy(), max_steps=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
        callbacks=[HuggingFaceExport(**settings)],
    )
    said = ""
    with patch.object(PreTrainedModel, "save_pretrained", wrong if name == "wrong" else right):
        try:
            trainer.fit(learner, ProceduralData(num_train=16, num_validation=4, num_test=4, batch_size=8))
        except ValueError as error:
            said = str(error)
    if name != "wrong":
        ids = torch.arange(20).view(2, 10)
        hidden = learner.student(ids, torch.ones_like(ids))
        logits = learner.student.head().logits(hidden.flatten(0, 1)).detach()
    if trainer.is_global_zero:
        torch.save({"said": said, "logits": logits}, folder / f"{name}.pt")
"""


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory) -> Path:
    """What two ranks have exported of a student whose config ties what its files hold apart."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("exports")
    AutoModelForCausalLM.from_pretrained(pair[0]).save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(pair[0]).save_pretrained(folder / "student")
    config = folder / "student" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    script = folder / "fit.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, folder / "student", folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own model asks
@pytest.mark.parametrize("name", ["plain", "merged", "adapter"])
def test_the_folder_computes_what_the_shards_do(folder, name) -> None:
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    assert not found["said"]
    place = folder / name / "export" / "last"
    model = AutoModelForCausalLM.from_pretrained(folder / "student" if name == "adapter" else place)
    start = AutoModelForCausalLM.from_pretrained(folder / "student")
    if name == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, place)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits, before = (m(input_ids=ids).logits.flatten(0, 1) for m in (model.eval(), start))
    torch.testing.assert_close(logits, found["logits"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, logits, atol=1e-2)


@pytest.mark.slow
def test_a_wrong_folder_is_found(folder) -> None:
    said = torch.load(folder / "wrong.pt", weights_only=True)["said"]
    assert "export/last: the export differs" in said
    assert "differ from the trained ones: model.norm.weight." in said
    assert [path.name for path in (folder / "wrong" / "export").iterdir()] == ["last.wrong"]
