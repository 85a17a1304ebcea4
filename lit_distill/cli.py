"""`lit-distill fit | validate | test | predict`: a LightningCLI in which a method is a YAML file."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lit_distill.callbacks
import lit_distill.data
import lit_distill.objectives
import lit_distill.rollouts
import lit_distill.schedulers  # with the others: YAML names the classes of all of these without their modules
from lit_distill.callbacks import (
    GenerationEvaluator,
    HuggingFaceExport,
    PredictionWriter,
    RolloutMonitor,
    RunCheckpoint,
    RunProgress,
)
from lit_distill.module import DistillationModule
from lit_distill.parser import DistillParser

CHECKPOINT_WORDS = ("best", "last", "hpc")
SUBCOMMANDS = ("fit", "validate", "test", "predict")


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
            parser_class=DistillParser,
            parser_kwargs={
                "prog": "lit-distill",
                "version": lit_distill.__version__,
                "description": "Distil a small language model from a large one. A method is a YAML file.",
                **{name: {"usage": f"lit-distill {name} --config FILE [--KEY VALUE ...]"} for name in SUBCOMMANDS},
            },
            args=args,
            auto_configure_optimizers=False,
            **arguments,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys ``checkpoint``, ``generation`` and ``export``, and say every value once."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GenerationEvaluator, "generation")
        parser.add_lightning_class_args(HuggingFaceExport, "export")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(RolloutMonitor, "rollouts")
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
                "trainer.enable_model_summary": False,
                "trainer.log_every_n_steps": 10,
            }
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint that is not there, and keep the output readable.

        No bars of transformers and datasets where nobody watches, no notes on what is meant to be so.
        """
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint not in (None, *CHECKPOINT_WORDS) and "://" not in checkpoint and not Path(checkpoint).exists():
            raise ValueError(f"ckpt_path: there is no {checkpoint}. Give a .ckpt file, or one of {CHECKPOINT_WORDS}.")
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_this_run)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning 2.6, with torch 2.13
        if self.subcommand != "fit":  # a checkpoint brings the state of a ModelCheckpoint that will not write anything
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # CSV beside TensorBoard

    def after_fit(self) -> None:
        """Say where to look."""
        rank_zero_info(
            f"Logs and checkpoints: {self.trainer.log_dir} (tensorboard --logdir {self.trainer.default_root_dir})"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs to TensorBoard with CSV beside it and has our progress bar, unless the config says otherwise."""
        config = self._get(self.config_init, "trainer")
        if config.get("logger") in (None, True):
            tensorboard = TensorBoardLogger(config.default_root_dir, name=self._run_name())
            beside = CSVLogger(config.default_root_dir, name=tensorboard.name, version=tensorboard.version)
            kwargs["logger"] = [tensorboard, beside]
        configured = config.get("callbacks") or []
        callbacks = configured if isinstance(configured, list) else [configured]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        return super().instantiate_trainer(**kwargs)

    def _run_name(self) -> str:
        if name := self._get(self.config_init, "run_name"):
            return str(name)
        configs = self._get(self.config, "config") or []
        return Path(str(configs[0])).stem if configs else "run"


def main(args: ArgsType = None) -> None:
    """Run the command line; what is wrong with the user's input is said in one message."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # classes of the user's own; last, so that no file of theirs hides a package
    try:
        DistillCLI(args)
    except (ValueError, MisconfigurationException) as error:
        message = _for_the_user(error)
        if os.environ.get("LIT_DISTILL_TRACEBACK") or message is None:
            raise
        sys.exit(f"error: {message}\n(The whole traceback: LIT_DISTILL_TRACEBACK=1)")


def _for_the_user(error: BaseException | None) -> str | None:
    """The message that was written for the reader of the YAML: the project's own, wrapped by others or not, or Lightning's."""
    packages = (Path(__file__).parent, Path(lit_distill.callbacks.__file__).parent)
    while error is not None:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, MisconfigurationException) or any(raised_in.is_relative_to(p) for p in packages):
            return str(error)
        error = error.__cause__
    return None


def _is_about_this_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡 Tip", "TPU available"))


if __name__ == "__main__":
    main()
