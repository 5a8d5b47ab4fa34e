"""Which generator samples: the one that is named, found beside the run, or trained first."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.checkpoints import check_architecture, find
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.job import run_nested
from pipeline.core.pretrained import tokenizer_sha256
from pipeline.evaluation.inputs import with_trained
from pipeline.generator import train_generator
from pipeline.generator.fit import check_fit, cut_of, read_generator
from pipeline.tokens.token_manifest import NAME, with_path

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from tatok_model.generation.generator import Generator


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
    made = run_nested("train_generator", "pipeline.generator.train_generator", config)
    return with_trained(_with_checkpoint(made.config, made.folder / "checkpoint"))


def check_generator(config: Config) -> Config:
    """Refuse a generator that cannot be used; one that would be trained first is checked as training does.

    Returns:
        The configuration with what is there already; `generator.checkpoint` is empty where it would be trained.

    Raises:
        BadInput: a checkpoint that is none or of another tokenizer, no tokenizer, or one of another architecture.
    """
    found = with_trained(_with_made(config))
    if not found.generator.checkpoint:
        train_generator.check(config)
        return found
    _check_tokenizer(found)
    check_architecture(found)
    check_fit(found, read_generator(found.generator.checkpoint))
    return found


def load_generator(config: Config) -> "tuple[Generator, str]":
    """The generator of `generator.checkpoint`, in evaluation mode, and the sha256 of its weights.

    Raises:
        BadInput: no such folder, one that holds no generator or damaged weights, or a generator of another tokenizer
            than the one of `tokenizer.checkpoint`.
    """
    from safetensors import SafetensorError

    from tatok_model.generation.generator import Generator

    path = config.generator.checkpoint
    folder = find(path, "generator.checkpoint")
    found = read_generator(path)
    _check_tokenizer(config)
    check_fit(config, found, tokenizer_sha256(config))
    try:
        generator = Generator.from_pretrained(folder)
    except (SafetensorError, RuntimeError) as error:  # no such file, or weights of another shape
        reason = " ".join(str(error).split())
        raise BadInput(f"generator.checkpoint {path!r} has damaged weights ({reason}); expected those saved") from None
    return generator.eval(), sha256_file(folder / "model.safetensors")


def _with_made(config: Config) -> Config:
    """With what `jobs/train_generator.py` left in the run of the same preset and output, where nothing is named.

    Raises:
        BadInput: it is of another size, or learned sequences of another cut.
    """
    folder = Path(config.run.output) / train_generator.default_name(config)
    if config.generator.checkpoint or not (folder / "checkpoint" / "config.json").is_file():
        return config
    found = read_generator(str(folder))
    wanted = {"size": config.generator.size, "cut": cut_of(config.filter, config.tokenizer.patch_tokens)}
    for name, value in wanted.items():
        if getattr(found, name) not in ("", value):
            raise BadInput(
                f"generator.checkpoint is empty and the generator in {str(folder)!r} has {name} "
                f"{getattr(found, name)!r}; expected {value!r}, as configured, generator.checkpoint, or another "
                "run.output to train one in"
            )
    return _with_checkpoint(_with_tokens_of(config, folder), folder / "checkpoint")


def _with_tokens_of(config: Config, folder: Path) -> Config:
    """With the stream that a training read, as if it had just ended: classes are called as they are there."""
    summary = folder / "summary.json"
    if config.tokens.path or not summary.is_file():
        return config
    path = json.loads(summary.read_text())["inputs"].get("tokens", {}).get("path")
    return with_path(config, Path(path)) if path and (Path(path) / NAME).is_file() else config


def _with_checkpoint(config: Config, folder: Path) -> Config:
    return dataclasses.replace(config, generator=dataclasses.replace(config.generator, checkpoint=str(folder)))


def _check_tokenizer(config: Config) -> None:
    if not config.tokenizer.checkpoint:
        raise BadInput(
            f"tokenizer.checkpoint is empty; expected the tokenizer whose tokens {config.generator.checkpoint!r} writes"
        )
