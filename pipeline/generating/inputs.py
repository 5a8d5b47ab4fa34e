"""Which generator samples: the one that is named, found beside the run, or trained first."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoints import check_architecture, find
from pipeline.config import Config
from pipeline.errors import BadInput
from pipeline.evaluation.inputs import with_trained
from pipeline.generating import training_stage
from pipeline.generating.fit import check_fit, read_generator
from pipeline.job import run_nested
from pipeline.paths import sha256_file
from pipeline.pretrained import tokenizer_sha256
from pipeline.progress import say

if TYPE_CHECKING:  # torch is imported inside functions: a stage's `check` answers without it
    from tatok_model.generator import Generator


def with_generator(config: Config) -> Config:
    """The configuration with `generator.checkpoint` and `tokenizer.checkpoint`; trains with it where there is none yet.

    Raises:
        BadInput: as training a generator.
    """
    if config.generator.checkpoint:
        return with_trained(config)
    found = _with_made(config)
    if found.generator.checkpoint:
        say(f"generator.checkpoint is empty: taking {found.generator.checkpoint}")
        return with_trained(found)
    say("generator.checkpoint is empty: training first")
    made = run_nested("train_generator", "pipeline.generating.training_stage", config)
    return with_trained(_with_checkpoint(made.config, made.folder / "checkpoint"))


def check_generator(config: Config) -> None:
    """Refuse a generator that cannot be used; one that would be trained first is checked as training does.

    Raises:
        BadInput: a checkpoint that is none or of another tokenizer, no tokenizer, or one of another architecture.
    """
    found = with_trained(_with_made(config))
    if not found.generator.checkpoint:
        training_stage.check(config)
        return
    _check_tokenizer(found)
    check_architecture(found)
    check_fit(found, read_generator(found.generator.checkpoint))


def load_generator(config: Config) -> "tuple[Generator, str]":
    """The generator of `generator.checkpoint`, in evaluation mode, and the sha256 of its weights.

    Raises:
        BadInput: no such folder, one that holds no generator, or a generator of another tokenizer than the one of
            `tokenizer.checkpoint`.
    """
    from tatok_model.generator import Generator

    path = config.generator.checkpoint
    folder = find(path, "generator.checkpoint")
    found = read_generator(path)
    _check_tokenizer(config)
    check_fit(config, found, tokenizer_sha256(config))
    return Generator.from_pretrained(folder).eval(), sha256_file(folder / "model.safetensors")


def _with_made(config: Config) -> Config:
    """With what `jobs/train_generator.py` left in the run of the same preset and output, where nothing is named."""
    folder = Path(config.run.output) / training_stage.default_name(config) / "checkpoint"
    if config.generator.checkpoint or not (folder / "config.json").is_file():
        return config
    return _with_checkpoint(config, folder)


def _with_checkpoint(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, checkpoint=str(folder)))


def _check_tokenizer(config: Config) -> None:
    if not config.tokenizer.checkpoint:
        raise BadInput(
            f"tokenizer.checkpoint is empty; expected the tokenizer whose tokens {config.generator.checkpoint!r} writes"
        )
