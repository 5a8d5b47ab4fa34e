"""The stage behind `jobs/train_generator.py`: a ranked token stream in, a generator checkpoint out."""

from pathlib import Path
from typing import Any

from pipeline.core.checkpoints import check_architecture, check_begun, find, read_generator
from pipeline.core.cluster import check_machine
from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import sha256_file
from pipeline.core.inputs import find_input, with_input
from pipeline.core.manifest import values_of
from pipeline.core.run import Run
from pipeline.data.checks import check_global_counts
from pipeline.data.shards import read_manifest
from pipeline.generator.fit import asked_labels, check_global_cut, check_guidance, check_start
from pipeline.tokens import tokenize as tokenizing
from pipeline.tokens.token_manifest import TokenManifest, check_stream, read_token_manifest
from pipeline.tracking import Tracker, check_tracking
from pipeline.training.train import train_and_export


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made; reads no tokens.

    Raises:
        BadInput: as tokenizing's `check` where no stream is named; a stream that is none, of another tokenizer, score
            or number of rounds than configured, or without rows in a split; a cut that it does not allow; no tokenizer
            to draw pictures with; a checkpoint to start from that does not fit; classes or guidance for the pictures
            that cannot be, where the classes are known; more workers than CPUs; a tracking address of unknown form.
    """
    section = config.train_generator
    check_machine("train_generator", section)
    check_tracking(config)
    if config.generator.checkpoint:
        read_generator(config.generator.checkpoint)
    if not config.tokens.path:
        tokenizing.check(config)
        if config.data.shards:
            _check_pictures(config, len(read_manifest(config.data.shards).classes))
        return
    found = find_input(config, "tokens.path")
    check_architecture(found)
    _check_tokens(found, read_token_manifest(found.tokens.path))
    check_global_counts(found)


def default_name(config: Config) -> str:
    """The run folder's name when `run.name` is empty."""
    return f"{config.preset}-train-generator"


def decides(config: Config, manifest: TokenManifest) -> dict[str, Any]:
    """What decides the weights of a step, by key: a run that goes on must have the same."""
    return {**_given(config), "tokens.path": manifest.fingerprint}


def _given(config: Config) -> dict[str, Any]:
    cut = {"filter.rule": config.filter.rule, "filter.threshold": config.filter.threshold}
    return {**values_of(config, "generator", "train_generator"), **cut}


def made_of(config: Config) -> dict[str, Any]:
    """What decides the weights that a training on `tokens.path` ends with."""
    values = decides(config, read_token_manifest(config.tokens.path))
    start = {"weights": sha256_file(_start(config))} if config.generator.checkpoint else {}
    return {**values, "train_generator.max_steps": config.train_generator.max_steps, **start}


def _start(config: Config) -> Path:
    return find(config.generator.checkpoint, "generator.checkpoint") / "model.safetensors"


def run(run: Run) -> None:
    """Train, and leave the averaged generator in `checkpoint/`."""
    check_begun(run, _given(run.config))  # before anything is made for nothing
    config = run.config = with_input(run.config, "tokens.path")
    manifest = read_token_manifest(config.tokens.path)
    _check_tokens(config, manifest)
    run.inputs["tokens"] = {"path": config.tokens.path, "sha256": manifest.fingerprint}
    if config.tokenizer.checkpoint:
        run.inputs["tokenizer"] = {"path": config.tokenizer.checkpoint, "sha256": manifest.stream.tokenizer_sha256}
    if path := config.generator.checkpoint:
        run.inputs["generator"] = {"path": path, "sha256": sha256_file(_start(config))}
    check_begun(run, decides(config, manifest))
    run.made_of = made_of(config)
    tags = {"tokens_fingerprint": manifest.fingerprint, "tokenizer_sha256": manifest.stream.tokenizer_sha256}
    with Tracker.start(run, tags) as tracker:
        train_and_export(run, tracker, "train_generator", "pipeline.generator.generator_training", "validation/samples")


def _check_tokens(config: Config, manifest: TokenManifest) -> None:
    """Refuse a stream that does not fit the rest of the configuration, or example pictures that cannot be drawn."""
    path = config.tokens.path
    check_stream(config, manifest.stream)
    check_global_cut(manifest, config.filter)
    rows = {name: split.rows for name, split in manifest.splits.items()}
    if not all(rows.values()):
        raise BadInput(f"tokens.path {path!r} holds {rows} rows; expected some in both splits")
    if config.generator.checkpoint:
        check_start(config, manifest, read_generator(config.generator.checkpoint))
    if config.train_generator.grid_images and not config.tokenizer.checkpoint:
        raise BadInput(
            f"tokenizer.checkpoint is empty; expected the tokenizer that made {path!r}, "
            "or train_generator.grid_images=0"
        )
    _check_pictures(config, len(manifest.classes))


def _check_pictures(config: Config, classes: int) -> None:
    """Refuse classes or guidance that the example pictures cannot have."""
    if config.train_generator.grid_images:
        check_guidance(config.generate, asked_labels(config.generate, classes), config.generator.class_dropout)
