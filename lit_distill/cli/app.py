"""`lit-distill fit | validate | test | predict | cache`: a LightningCLI in which a method is a YAML file."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import transformers
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import lit_distill.callbacks
import lit_distill.data
import lit_distill.objectives
import lit_distill.optim  # like the others: YAML may name the classes of these modules without their path
import lit_distill.sources
import lit_distill.teachers
from lit_distill.callbacks import (
    CalibrationMonitor,
    ExposureBiasMonitor,
    GenerationEvaluator,
    HuggingFaceExport,
    OnPolicyEvaluator,
    PredictionWriter,
    RolloutMonitor,
    RunCheckpoint,
    RunProgress,
    RunReport,
)
from lit_distill.cli.errors import ERRORS, ConfigKeys, trainer_message, user_message
from lit_distill.cli.parser import DistillParser, check_configs, without_template
from lit_distill.cli.runs import best_checkpoint, check_checkpoint, continue_log, last_checkpoint, run_loggers
from lit_distill.cli.trainer import DistillTrainer
from lit_distill.distributed.watchdog import exit_with_rank_zero
from lit_distill.generation import Prediction
from lit_distill.module import DistillationModule
from lit_distill.resume import check_continuation
from lit_distill.sources import DatasetResponses
from lit_distill.validation import (
    check_callback_classes,
    check_seed,
    check_trainer,
    check_trainer_options,
    check_writable,
)

CHECKPOINT_WORDS = ("best", "last", "hpc")
SUBCOMMANDS = ("fit", "validate", "test", "predict", "cache")
CALLBACKS = {
    "checkpoint": RunCheckpoint,
    "generation": GenerationEvaluator,
    "calibration": CalibrationMonitor,
    "exposure_bias": ExposureBiasMonitor,
    "on_policy": OnPolicyEvaluator,
    "export": HuggingFaceExport,
    "report": RunReport,
    "predictions": PredictionWriter,
    "rollouts": RolloutMonitor,
}
"""The callbacks of every run, by YAML key."""


class DistillCLI(LightningCLI):
    """The command line: one module, any data module, and the callbacks of every run under their own keys."""

    _continued: Path | None = None
    """The checkpoint that this run resumes."""

    def __init__(self, args: ArgsType = None, **arguments: Any) -> None:
        words = sys.argv[1:] if args is None else list(args)
        self._subcommand = words[0] if words and words[0] in SUBCOMMANDS else None
        # Parse the docstrings of ModelSpec's fields only if they are printed: it takes longer than everything else together.
        prints_help = any(word == "-h" or "help" in word or "print_config" in word for word in words)
        set_parsing_settings(docstring_parse_attribute_docstrings=prints_help)
        super().__init__(
            DistillationModule,
            LightningDataModule,
            trainer_class=DistillTrainer,
            subclass_mode_data=True,
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            parser_class=DistillParser,
            parser_kwargs={
                "prog": "lit-distill",
                "allow_abbrev": False,  # a mistyped key is an error, as it is in YAML
                "version": lit_distill.__version__,
                "description": "Distil a small language model from a large one. A method is a YAML file.",
                **{
                    name: {"usage": f"lit-distill {name} --config FILE [--KEY VALUE ...]"}
                    for name in self.subcommands()
                },
            },
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the module saves no hyperparameters
            **arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The requested subcommand alone, so that only its keys are collected; without one, all of them."""
        available = {**LightningCLI.subcommands(), "cache": {"model", "datamodule"}}
        return {self._subcommand: available[self._subcommand]} if self._subcommand else available

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the callbacks that every run has, set defaults, and link keys with equal values."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_argument(
            "--run_name",
            type=str | None,
            default=None,
            help="Folder of the run below default_root_dir; the config's name by default.",
        )
        parser.set_defaults(
            {
                "checkpoint.monitor": "auto",
                "checkpoint.mode": "auto",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.filename": "step-{step}",
                "trainer.default_root_dir": "runs",
                "trainer.enable_model_summary": False,
                "trainer.log_every_n_steps": 10,
            }
        )
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and check the seed, which Lightning uses before anything else."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            words, template = without_template(sys.argv[1:] if args is None else args)
            if self._subcommand:
                check_configs(words)
            self.config = parser.parse_args(words)
            if template is not None:
                self._whole_config().data.init_args.template = template
        check_seed(self._whole_config().get("seed_everything"))

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would read the whole checkpoint to find hyperparameters, and ours have none."""

    def before_instantiate_classes(self) -> None:
        """Check callbacks, checkpoint and output folders, and keep the output readable.

        Without a terminal, transformers and datasets show no progress bars; warnings about intended behaviour are filtered.
        """
        config = self._whole_config()
        check_callback_classes(config.trainer.callbacks)
        if self.subcommand:
            self._find_checkpoint(config)
            check_writable(Path(config.trainer.default_root_dir), "trainer.default_root_dir")
            if self.subcommand == "predict" and config.model.prediction:
                check_writable(Path(config.model.prediction.path).parent, "model.prediction.path")
        if not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
            datasets.disable_progress_bars()
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_this_run)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning 2.6, with torch 2.13
        warnings.filterwarnings("ignore", message=".*sync_dist=True")  # what is logged is equal on all ranks
        if (
            self.subcommand != "fit"
        ):  # the checkpoint contains the state of a ModelCheckpoint, which writes nothing in this subcommand
            warnings.filterwarnings("ignore", message="The dirpath has changed")
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # CSV beside TensorBoard

    def _find_checkpoint(self, config: Any) -> None:
        """Replace the words `last` and `best` by the newest such checkpoint over all versions of this run."""
        if self.subcommand == "cache":  # it trains nothing
            return
        checkpoint = config.get("ckpt_path")
        if checkpoint in ("last", "best") and config.checkpoint.dirpath is None:
            last = last_checkpoint(config.trainer.default_root_dir, run_name(config))
            if last is None and (checkpoint == "best" or self.subcommand != "fit"):
                raise ValueError(
                    f"ckpt_path: there is no `{checkpoint}` checkpoint of the run {run_name(config)!r} in "
                    f"{config.trainer.default_root_dir}. Give a .ckpt file, or run `fit` first."
                )
            if last is not None:
                check_checkpoint(last)
            config.ckpt_path = last and str(last if checkpoint == "last" else best_checkpoint(last))
            missing = "there is no checkpoint yet, so the run starts from the beginning."
            rank_zero_info(f"ckpt_path: {config.ckpt_path or missing}")
            if self.subcommand == "fit" and checkpoint == "last":
                self._continued = last
        if config.ckpt_path not in (None, *CHECKPOINT_WORDS) and "://" not in config.ckpt_path:
            check_checkpoint(Path(config.ckpt_path))
        if config.weights_only is False:
            raise ValueError(
                "weights_only: false lets a checkpoint run any code. Remove it: checkpoints of lit-distill need no code."
            )
        config.weights_only = True  # Lightning's default unpickles any object in a local file

    def instantiate_classes(self) -> None:
        """Build all objects; an error about their arguments gets the YAML key."""
        config = self._whole_config()
        fixed = {DistillationModule: "model", Prediction: "model.prediction", DatasetResponses: "model.source"}
        self._keys = ConfigKeys(config.as_dict(), fixed | {callback: key for key, callback in CALLBACKS.items()})
        with self._keys.attached():
            super().instantiate_classes()
        if self.subcommand == "fit":
            check_trainer(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        with self._keys.attached():
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        """Check that these settings can resume the checkpoint, and continue the log of its run."""
        checkpoint = self._whole_config().ckpt_path
        if checkpoint not in (None, *CHECKPOINT_WORDS) and "://" not in checkpoint:
            check_continuation(self.model, self.trainer, Path(checkpoint))
        if self._continued is not None:
            continue_log(self.trainer, self._continued)

    def after_fit(self) -> None:
        """Print where logs and checkpoints are."""
        rank_zero_info(
            f"Logs and checkpoints: {self.trainer.log_dir} (tensorboard --logdir {self.trainer.default_root_dir})"
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that logs to TensorBoard and CSV and has our progress bar, unless the config sets others.

        `predict` has no metrics to log and writes only its JSONL file.
        """
        config = self._get(self.config_init, "trainer")
        predicts = self.subcommand in ("predict", "cache")
        if predicts:
            self.save_config_callback = None
        if config.get("logger") in (None, True):
            name = run_name(self._whole_config())
            kwargs["logger"] = not predicts and run_loggers(config.default_root_dir, name, self._continued)
        configured = config.get("callbacks") or []
        callbacks = configured if isinstance(configured, list) else [configured]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, RunProgress()]
        if self.subcommand:
            check_trainer_options(config, self.subcommand)
        try:
            return super().instantiate_trainer(**kwargs)
        except ERRORS as error:
            raise ValueError(trainer_message(error, config.as_dict())) from error

    def _whole_config(self) -> Any:
        subcommand = self.config.get("subcommand")
        return self.config[subcommand] if subcommand else self.config


def run_name(config: Any) -> str:
    """The name of a run's folder in ``trainer.default_root_dir``: ``run_name``, or the name of its first config file."""
    if config.run_name:
        name = Path(str(config.run_name))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(
                f"run_name: {name} is outside of trainer.default_root_dir. Give a name, and set that folder to another one."
            )
        return str(config.run_name)
    configs = config.config or []
    return Path(str(configs[0])).stem if configs else "run"


def main(args: ArgsType = None) -> None:
    """Run the command line; errors in the user's input end it with one message and without a traceback."""
    exit_with_rank_zero()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for the user's own classes; last, so that no file there hides a package
    try:
        DistillCLI(args)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)  # the run is not finished, although it was saved
    except (ValueError, RuntimeError, MisconfigurationException, OSError) as error:
        message = user_message(error, (Path(lit_distill.__file__).parent, Path(lit_distill.callbacks.__file__).parent))
        if os.environ.get("LIT_DISTILL_TRACEBACK") or message is None:
            raise
        sys.exit(f"error: {message}\n(For the full traceback, set LIT_DISTILL_TRACEBACK=1.)")


def _is_about_this_run(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(("💡 Tip", "TPU available"))


if __name__ == "__main__":
    main()
