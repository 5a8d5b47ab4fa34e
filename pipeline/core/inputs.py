"""Inputs that a stage needs and no key names: found where their job leaves them, else made first; a line says so.

Stages are asked by name, so that nothing here imports a higher package.
"""

from pathlib import Path

from pipeline.core.checkpoints import check_architecture, read_generator
from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.job import run_nested
from pipeline.core.run import read_summary
from pipeline.core.stages import find_stage


def with_shards(config: Config) -> Config:
    """The configuration with `data.shards`; makes them from `data.source` when it names none."""
    if config.data.shards:
        return config
    say("data.shards is empty: preprocessing data.source first")
    return config.with_values("data", shards=str(run_nested("preprocess", config).folder))


def with_trained(config: Config) -> Config:
    """The configuration with `tokenizer.checkpoint`: as given, else what training made; nothing is trained here."""
    folder = _run_folder("train", config) / "checkpoint"
    if config.tokenizer.checkpoint or not (folder / "config.json").is_file():
        return config
    return config.with_values("tokenizer", checkpoint=str(folder))


def check_tokenizer(config: Config) -> None:
    """Refuse a tokenizer that cannot be used; one that would be trained first is checked as training does.

    Raises:
        BadInput: as training's `check` where there is no tokenizer yet; a checkpoint of another architecture.
    """
    found = with_trained(config)
    if found.tokenizer.checkpoint:
        check_architecture(found)
    else:
        find_stage("train").check(config)


def with_tokenizer(config: Config, shards_sha256: str) -> Config:
    """The configuration with `tokenizer.checkpoint`; trains with the same configuration when there is none yet.

    Args:
        config: with `data.shards`.
        shards_sha256: their fingerprint.

    Raises:
        BadInput: the tokenizer that training left was made from other shards, so that the pictures to measure may be
            among those it has seen.
    """
    if config.tokenizer.checkpoint:
        return config
    found = with_trained(config)
    if not found.tokenizer.checkpoint:
        say("tokenizer.checkpoint is empty: training first")
        return config.with_values("tokenizer", checkpoint=str(run_nested("train", config).folder / "checkpoint"))
    folder = _run_folder("train", config)
    if read_summary(folder)["inputs"].get("shards", {}).get("sha256") != shards_sha256:
        raise BadInput(
            f"tokenizer.checkpoint is empty and the tokenizer in {str(folder)!r} was trained on other shards than "
            f"{config.data.shards!r}; expected tokenizer.checkpoint, or another run.output to train one in"
        )
    say(f"tokenizer.checkpoint is empty: taking {found.tokenizer.checkpoint}")
    return found


def with_tokens(config: Config) -> Config:
    """The configuration with `tokens.path` and `tokenizer.checkpoint`; makes the stream when none is named."""
    if config.tokens.path:
        return with_trained(config)
    say("tokens.path is empty: tokenizing first")
    made = run_nested("tokenize_images", config)
    return made.config.with_values("tokens", path=str(made.folder))


def with_trained_generator(config: Config) -> Config:
    """With `generator.checkpoint` and `tokenizer.checkpoint` where they are given or their jobs left them.

    Raises:
        BadInput: the generator that was left is of another size, or learned sequences of another cut.
    """
    folder = _run_folder("train_generator", config)
    if config.generator.checkpoint or not (folder / "checkpoint" / "config.json").is_file():
        return with_trained(config)
    found = read_generator(str(folder))
    wanted = {"size": config.generator.size, "cut": config.filter.cut(config.tokenizer.patch_tokens)}
    for name, value in wanted.items():
        if getattr(found, name) not in ("", value):
            raise BadInput(
                f"generator.checkpoint is empty and the generator in {str(folder)!r} has {name} "
                f"{getattr(found, name)!r}; expected {value!r}, as configured, generator.checkpoint, or another "
                "run.output to train one in"
            )
    if not config.tokens.path and (folder / "summary.json").is_file():
        # With the stream that it was trained on, as if that had just ended: classes are called as they are there.
        path = read_summary(folder)["inputs"].get("tokens", {}).get("path")
        if path and (Path(path) / "tokens.json").is_file():
            config = config.with_values("tokens", path=path)
    return with_trained(config.with_values("generator", checkpoint=str(folder / "checkpoint")))


def with_generator(config: Config) -> Config:
    """The configuration with `generator.checkpoint` and `tokenizer.checkpoint`; trains with it where there is none yet.

    Raises:
        BadInput: as `with_trained_generator` and as training a generator.
    """
    found = with_trained_generator(config)
    if not found.generator.checkpoint:
        say("generator.checkpoint is empty: training first")
        made = run_nested("train_generator", config)
        return with_trained(made.config.with_values("generator", checkpoint=str(made.folder / "checkpoint")))
    if not config.generator.checkpoint:
        say(f"generator.checkpoint is empty: taking {found.generator.checkpoint}")
    return found


def _run_folder(name: str, config: Config) -> Path:
    """Where the job of this name leaves the run of the same preset and output."""
    return Path(config.run.output) / find_stage(name).default_name(config)
