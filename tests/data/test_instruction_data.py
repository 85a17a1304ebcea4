from __future__ import annotations

import re
from itertools import chain

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer

from lit_distill.data import Corpus, InstructionData, Records


@pytest.fixture
def make(write_jsonl, items, tokenizer, tmp_path):
    """An InstructionData over 50 items, whose tokenizer is loaded from a folder."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train = Records(write_jsonl(items(50)))

    def build(**options) -> InstructionData:
        options.setdefault("train", train)
        return InstructionData(
            **{"template": "{instruction} {input}", "tokenizer": str(tmp_path / "tokenizer"), **options}
        )

    return build


def ids(loader) -> list[tuple[str, ...]]:
    return [batch.ids for batch in loader]


def everything(loader) -> list[list]:
    return [
        [batch.ids, batch.sequences.input_ids.tolist(), batch.corpus and batch.corpus.input_ids.tolist()]
        for batch in loader
    ]


def test_a_jsonl_file_becomes_batches_that_say_what_it_says(make, tokenizer, items):
    data = make(batch_size=4, max_prompt_length=200, max_length=400)
    data.setup("fit")
    said = {}
    for batch in data.train_dataloader():
        for row, name in enumerate(batch.ids):
            response = batch.sequences.input_ids[row][batch.sequences.target_mask[row]]
            prompt = batch.prompts.input_ids[row][batch.prompts.attention_mask[row].bool()]
            said[name] = (tokenizer.decode(prompt), tokenizer.decode(response), batch.references[row])
    written = {
        f"train-{n}": (f"{item['instruction']} {item['input']}", item["output"] + "<eos>", (item["output"],))
        for n, item in enumerate(items(50))
    }
    assert len(said) == 48  # the rest that fills no batch waits for another epoch
    assert said.items() <= written.items()


def test_the_validation_split_is_disjoint_and_the_same_for_the_same_seed(make):
    splits = []
    for seed in (0, 0, 1):
        data = make(validation_size=10, seed=seed, batch_size=1)
        data.setup("fit")
        splits.append((set(chain(*ids(data.train_dataloader()))), set(chain(*ids(data.val_dataloader())))))
    for train, validation in splits:
        assert (len(train), len(validation)) == (40, 10)
        assert not train & validation
    assert splits[0] == splits[1] != splits[2]


def test_test_falls_back_to_validation_and_predict_to_the_training_part(make):
    data = make(validation_size=0.2)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert ids(data.test_dataloader()) == ids(data.val_dataloader())
    predicted = set(chain(*ids(data.predict_dataloader())))
    assert len(predicted) == 40
    assert not predicted & set(chain(*ids(data.val_dataloader())))


def test_training_on_prompts_alone_leaves_validation_its_responses(make, write_jsonl, items):
    prompts = Records(write_jsonl([{"instruction": f"go {n}"} for n in range(8)], "prompts.jsonl"))
    labelled = Records(write_jsonl(items(4), "labelled.jsonl"))
    data = make(train=prompts, validation=labelled, responses=False)
    data.setup("fit")
    assert all(batch.sequences is None for batch in data.train_dataloader())
    expected = make(train=labelled, validation=labelled)
    expected.setup("fit")
    assert everything(data.val_dataloader()) == everything(expected.val_dataloader())
    assert data.validates_responses
    assert data.validates_references
    unlabelled = make(train=prompts, validation=prompts, responses=False)
    unlabelled.setup("fit")
    assert all(batch.sequences is None for batch in unlabelled.val_dataloader())
    assert not unlabelled.validates_responses
    assert not unlabelled.validates_references
    with pytest.raises(ValueError, match=r"fields\.output: there is no column 'output' in the validation records"):
        make(train=prompts, validation=prompts, responses=False, fields={"output": "output"}).setup("fit")
    with pytest.raises(ValueError, match=r"fields\.output: there is no column 'output'"):
        make(train=prompts, fields={"output": "output"}).setup("fit")


def test_responses_that_are_not_read_may_be_empty(make, write_jsonl):
    rows = [{"instruction": "go", "output": text} for text in ("", None, "there")]
    data = make(train=Records(write_jsonl(rows)), responses=False, batch_size=3)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch.references) == [(), (), ("there",)]


def test_prompts_to_be_answered_need_no_output(make, write_jsonl):
    data = make(predict=Records(write_jsonl([{"instruction": "go"}], "prompts.jsonl")), template="{instruction}")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.sequences is None
    assert batch.prompt_texts == ("go",)


def test_workers_change_nothing(make, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    options = {"corpus": Corpus(str(tmp_path / "text.txt"), length=5, batch_size=3), "batch_size": 8}
    runs = []
    for workers in (0, 2):
        data = make(num_workers=workers, **options)
        data.setup("fit")
        loader = data.train_dataloader()
        first = everything(loader)
        loader.sampler.set_epoch(1)
        runs.append((first, everything(loader)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_loader_remembers_how_far_an_epoch_went_and_starts_the_next_afresh(make):
    data = make(batch_size=5)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    assert loader.state_dict().items() >= {"epoch": 0, "batches": 0, "items": 0}.items()
    taken = [next(batches).ids for _ in range(4)]
    state = loader.state_dict()
    assert state.items() >= {"epoch": 0, "batches": 4, "items": 20}.items()
    assert state["before"].items() >= {"epoch": 0, "batches": 3, "items": 15}.items()
    assert len(taken + ids(batches)) == 10
    loader.sampler.set_epoch(1)
    assert loader.state_dict().items() >= {"epoch": 1, "batches": 0, "items": 0}.items()

    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert {**resumed.state_dict(), "before": state["before"]} == state
    assert taken + ids(resumed) == ids(data.train_dataloader())


def test_loading_leaves_the_global_random_state_alone(make):
    data = make()
    data.setup("fit")
    state = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_dropped_is_reported(make, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lit_distill.data.instructions.rank_zero_info", said.append)
    make(max_prompt_length=10, max_length=40).setup("fit")
    assert re.search(
        r"train: \d+ items, \d+ dropped: \d+ with the prompt over 10 tokens \(max_prompt_length\)", said[1]
    )


def test_cut_items_are_no_longer_than_asked_for_and_keep_their_references(make):
    data = make(max_prompt_length=12, max_length=16, overlong="truncate", batch_size=50)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert len(batch) == 50
    assert batch.prompts.input_ids.shape[1] == 12
    assert batch.sequences.input_ids.shape[1] == 16
    assert all(
        reference[0].endswith(name.split("-")[1]) for name, reference in zip(batch.ids, batch.references, strict=True)
    )


def test_a_subclass_brings_its_own_records(tokenizer, monkeypatch):
    class Own(InstructionData):
        def read_split(self, name: str) -> datasets.Dataset | None:
            return datasets.Dataset.from_list([{"instruction": "x", "output": "y"}]) if name == "test" else None

    data = Own()
    monkeypatch.setattr(data, "_tokenizer", lambda: tokenizer)
    data.setup("test")
    assert ids(data.test_dataloader()) == [("test-0",)]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"validation_size": 1.0}, "validation_size"),
        ({"validation_size": -3}, "validation_size"),
        ({"validation_size": 3, "validation": Records("v.jsonl")}, "validation_size"),
        ({"max_prompt_length": 512}, "max_prompt_length"),
        ({"overlong": "keep"}, "overlong"),
        ({"template": "nothing"}, "template"),
        ({"fields": {"question": "q"}}, "fields"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_at_once_by_its_key(make, options, key):
    with pytest.raises(ValueError, match=rf"^{key}\b"):
        make(**options)


def test_a_stage_without_records_says_which_to_give(make):
    data = make()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^test.*Give test or validation"):
        data.test_dataloader()


def test_no_tokenizer_anywhere_is_an_error_and_so_is_a_wrong_one(make):
    with pytest.raises(ValueError, match=r"^tokenizer: there is no tokenizer"):
        make(tokenizer=None).setup("fit")
    with pytest.raises(ValueError, match=r"^tokenizer: no tokenizer could be loaded from '/nowhere'"):
        make(tokenizer="/nowhere").setup("fit")


def test_the_yaml_says_everything(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InstructionData, "data")
    config = {
        "class_path": "lit_distill.data.InstructionData",
        "init_args": {
            "train": {"path": ["a.jsonl", "b.jsonl"]},
            "validation_size": 0.1,
            "fields": {"instruction": "question"},
            "corpus": {"path": "text.txt", "length": 64},
        },
    }
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # its name before jsonargparse 4.50
    data = instantiate(parser.parse_object({"data": config})).data
    assert data.records["train"] == Records(["a.jsonl", "b.jsonl"])
    assert data.corpus == Corpus("text.txt", length=64)
    whole = parser.parse_object({"data": {**config, "init_args": {**config["init_args"], "validation_size": 10}}})
    assert isinstance(instantiate(whole).data.validation_size, int)


class Recorder(LightningModule):
    """Notes the ids of every batch; one parameter, so that there is something to optimise."""

    def __init__(self, tokenizer, stop_at: int | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch.ids))
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if len(self.seen) == self.stop_at:
            self.trainer.save_checkpoint(self.trainer.default_root_dir + "/middle.ckpt")
            self.trainer.should_stop = True

    def validation_step(self, batch, batch_idx): ...

    def predict_step(self, batch, batch_idx):
        return list(batch.ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def trainer(tmp_path):
    def build(**options) -> Trainer:
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{"max_epochs": 3, **quiet, **options})

    return build


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning calls a torch function on its way out
class TestUnderATrainer:
    def test_the_tokenizer_of_the_model_is_used_and_epochs_are_shuffled_anew(self, make, tokenizer, trainer):
        model = Recorder(tokenizer)
        trainer().fit(model, datamodule=make(tokenizer=None, validation_size=5))
        epochs = [[names for epoch, names in model.seen if epoch == number] for number in range(3)]
        assert [len(epoch) for epoch in epochs] == [5, 5, 5]
        assert epochs[0] != epochs[1] != epochs[2]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_fit_resumed_in_the_middle_of_an_epoch_sees_what_is_left_of_it(
        self, make, tokenizer, trainer, tmp_path, workers
    ):
        straight, first, second = Recorder(tokenizer), Recorder(tokenizer, stop_at=9), Recorder(tokenizer)
        trainer().fit(straight, datamodule=make(num_workers=workers))
        trainer().fit(first, datamodule=make(num_workers=workers))
        trainer().fit(
            second, datamodule=make(num_workers=workers), ckpt_path=tmp_path / "middle.ckpt", weights_only=True
        )
        assert first.seen + second.seen == straight.seen

    def test_overfit_batches_repeats_the_same_batch(self, make, tokenizer, trainer):
        model = Recorder(tokenizer)
        trainer(overfit_batches=1).fit(model, datamodule=make())
        assert len(model.seen) == 3
        assert len({names for _, names in model.seen}) == 1
        assert len(model.seen[0][1]) == 8

    def test_predict_answers_every_prompt_once(self, make, tokenizer, trainer):
        answers = trainer().predict(Recorder(tokenizer), datamodule=make())
        assert sorted(chain(*answers)) == sorted(f"train-{n}" for n in range(50))
