"""`lit-distill fit | validate | test | predict`: a LightningCLI in which a method is a YAML file."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import transformers
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

import lit_distill.callbacks
import lit_distill.data
import lit_distill.objectives
import lit_distill.rollouts
import lit_distill.schedulers  # with the others: YAML names the classes of all of these without their modules
from lit_distill.callbacks import GenerationEvaluator, HuggingFaceExport, PredictionWriter
from lit_distill.module import DistillationModule


class DistillCLI(LightningCLI):
    """The command line: one module, any data module, and the callbacks that every run wants as keys of their own."""

    def __init__(self, args: ArgsType = None, **arguments: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # what the fields of ModelSpec mean, in --help
        super().__init__(
            DistillationModule,
            LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": "Distil a small language model from a large one. A method is a YAML file."},
            args=args,
            auto_configure_optimizers=False,
            **arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys ``checkpoint``, ``generation`` and ``export``, and say every value once."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GenerationEvaluator, "generation")
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Folder of the run below default_root_dir; the config's name by default.",
        )
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.filename": "step-{step}",
                "trainer.default_root_dir": "runs",
                "trainer.log_every_n_steps": 10,
            }
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Keep the output readable: no bars of transformers where nobody watches, no notes on what is meant to be so."""
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning 2.6, with torch 2.13
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # CSV beside TensorBoard

    def after_fit(self) -> None:
        """Say where to look."""
        rank_zero_info(
            f"Logs and checkpoints: {self.trainer.log_dir} (tensorboard --logdir {self.trainer.default_root_dir})"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs to TensorBoard with CSV beside it, unless ``trainer.logger`` says otherwise."""
        trainer_config = self._get(self.config_init, "trainer")
        if trainer_config.get("logger") in (None, True):
            tensorboard = TensorBoardLogger(trainer_config.default_root_dir, name=self._run_name())
            beside = CSVLogger(trainer_config.default_root_dir, name=tensorboard.name, version=tensorboard.version)
            kwargs["logger"] = [tensorboard, beside]
        return super().instantiate_trainer(**kwargs)

    def _run_name(self) -> str:
        if name := self._get(self.config_init, "run_name"):
            return str(name)
        configs = self._get(self.config, "config") or []
        return Path(str(configs[0])).stem if configs else "run"


def main(args: ArgsType = None) -> None:
    """Run the command line; what is wrong with the user's input is said in one message."""
    try:
        DistillCLI(args)
    except ValueError as error:
        if os.environ.get("LIT_DISTILL_TRACEBACK") or not _is_ours(error):
            raise
        sys.exit(f"error: {error}\n(The whole traceback: LIT_DISTILL_TRACEBACK=1)")


def _is_ours(error: BaseException) -> bool:
    """Whether the project's own code raised it, and so wrote its message for the reader of the YAML."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    packages = (Path(__file__).parent, Path(lit_distill.callbacks.__file__).parent)
    return any(Path(last).is_relative_to(package) for package in packages)


if __name__ == "__main__":
    main()
