"""Checkpoints of a training run, and models from them, from files and from the hub.

Checkpoints are written aside and renamed, verified when read, kept by count, never unpickled:

    checkpoints/step-00000500/config.json, model.safetensors     averaged weights: `from_pretrained` loads them
                              training_state.safetensors          raw weights, optimisers
                              training_state.json                 step, samples seen, checksums of the other files

One writer serves the in-process loop and Ray Train's workers. Random states are not stored: every draw derives from the
seed and the step.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.config import Config
from pipeline.core.console import say
from pipeline.core.errors import BadInput, did_you_mean
from pipeline.core.files import ANSWER_SECONDS, BOX, boxed, in_the_box, resolve, sha256_file, within, write_json
from pipeline.core.run import Run
from tatok_model.config import GeneratorConfig, TokenizerConfig, read_config, read_generator_config
from tatok_model.filtering_rules import QUALITY_FILE, QualityLine, read_lines

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from torch import Tensor

    from tatok_model.losses import LPIPS
    from tatok_model.tokenizer import TaTok

FORMAT, VERSION = "tatok-training-state", 1
TENSORS, RECORD = "training_state.safetensors", "training_state.json"
WEIGHED = ("config.json", "model.safetensors", TENSORS)  # what a whole checkpoint has checksums of
OF_TRAINING = ("commitment_weight", "codebook_decay", "dead_code_share")  # may differ from a checkpoint's
SHAPING = tuple(  # the keys that decide the weights' shapes
    field.name for field in fields(TokenizerConfig) if field.name not in (*OF_TRAINING, "trunk_layers")
)
BROUGHT = (*SHAPING, "trunk_layers")  # what a checkpoint brings
OF_ENTROPY_MODEL = ("entropy_layers", "entropy_width", "entropy_globals")  # may differ where it is trained anew


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was verified."""

    folder: Path
    step: int
    record: dict[str, Any]

    def tensors(self) -> "dict[str, Tensor]":
        """Raw weights and optimiser state by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / TENSORS)


def save(folder: Path, step: int, model: Any, tensors: "dict[str, Tensor]", keep: int, **record: Any) -> Path:
    """Write `folder/step-NNNNNNNN` and delete the oldest beyond `keep`.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimiser steps done.
        model: the averaged one; its `save_pretrained` writes config.json and model.safetensors.
        tensors: what else resuming needs.
        keep: how many checkpoints stay.
        record: plain values to keep beside the step.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    with replaced(final) as aside:
        model.save_pretrained(aside)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / TENSORS)
        checksums = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        write_json(aside / RECORD, {"format": FORMAT, "version": VERSION, "step": step, "sha256": checksums, **record})
        for path in aside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def replaced(final: Path) -> Iterator[Path]:
    """A new folder beside `final`, which takes its place once the body has filled it; after an error nothing is left.

    What an earlier attempt left there when it was killed is removed.
    """
    for leftover in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:  # on full storage, what is half written would keep others from their room
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; torn or foreign ones are passed over and named."""
    for path in reversed(_steps(folder)):
        try:
            return _verified(path)
        except (OSError, ValueError, KeyError) as error:
            say(f"checkpoint {path} is not used: {error}")
    if _steps(folder):
        say(f"no checkpoint in {folder} can be used: beginning anew")
    return None


def check_begun(run: Run, decides: dict[str, Any]) -> None:
    """Refuse, before anything is tracked, to go on with a training that was begun with other values.

    Raises:
        BadInput: naming the first key that differs from the newest record that can be read.
    """
    for path in reversed(_steps(run.folder / "checkpoints")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            begun = dict(json.loads((path / RECORD).read_text())["decides"])
            run.check_unchanged(begun, decides, name_folder=False)
            return


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was in the middle of writing."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def find(path: str, key: str = "tokenizer.checkpoint") -> Path:
    """The folder that the value of a key means: a checkpoint, the run folder of a training that ended, one in the box.

    Raises:
        BadInput: neither.
    """
    for folder in (Path(path), Path(path) / "checkpoint", *([BOX / path] if in_the_box(path) else [])):
        if (folder / "config.json").is_file():
            return folder
    if not Path(path).is_dir():
        tokenizer = key == "tokenizer.checkpoint"
        others = f", a hub id or one in the box: {', '.join(boxed())}" if tokenizer else ""
        meant = did_you_mean(Path(path).name, boxed()) if tokenizer else ""
        problem = "is a file" if Path(path).exists() else f"does not exist{meant}"
        raise BadInput(f"{key} {path!r} {problem}; expected a checkpoint folder{others}")
    raise BadInput(f"{key} {path!r} holds no config.json; expected a folder that training wrote")


def is_hub_id(path: str) -> bool:
    """`owner/name`, as opposed to a path, which is absolute once resolved, and to a name in the box."""
    return "/" in path and not Path(path).is_absolute()


def check_architecture(config: Config) -> None:
    """Refuse a `tokenizer.checkpoint` that does not have the architecture the configuration describes.

    A hub id is only looked up when it is used.

    Raises:
        BadInput: no such checkpoint, not one of ours, or another architecture.
    """
    path = config.tokenizer.checkpoint
    if not path or is_hub_id(path):
        return
    check_same_architecture(path, read_architecture(path), config)


def read_architecture(path: str, key: str = "tokenizer.checkpoint") -> TokenizerConfig:
    """The architecture of the checkpoint that the value of a key means; its weights are not read.

    Raises:
        BadInput: no such checkpoint, or not one of ours.
    """
    try:
        return read_config(find(path, key))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(str(error)) from None


def read_generator(path: str) -> GeneratorConfig:
    """The architecture of `generator.checkpoint`, a checkpoint or the run folder of a training; reads no weights.

    Raises:
        BadInput: neither.
    """
    folder = Path(path) / "checkpoint"
    try:
        return read_generator_config(folder if (folder / "config.json").is_file() else Path(path))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(f"generator.checkpoint: {error}") from None


def with_architecture(values: dict[str, Any], typed: set[str]) -> dict[str, Any]:
    """Nested values of a configuration with the architecture of the tokenizer that they name, which brings its own.

    Args:
        values: as a preset and the command line have them.
        typed: keys of the command line, which stay: `check_architecture` refuses those that disagree.
    """
    sections = {name: values.get(name) or {} for name in ("data", "tokenizer", "train", "sweep")}
    if not all(isinstance(section, dict) for section in sections.values()):
        return values
    data, tokenizer, train, sweep = sections.values()
    several = sweep.get("checkpoints")
    path = tokenizer.get("checkpoint") or (several[0] if several and isinstance(several, list | tuple) else "")
    try:
        place = resolve("tokenizer.checkpoint", str(path)) if path else ""
        found = asdict(read_architecture(place)) if place and not is_hub_id(place) else {}
    except BadInput:  # whoever needs it says so
        found = {}
    anew = OF_ENTROPY_MODEL if train.get("parts") == "entropy" else ()
    brought = {name: found[name] for name in BROUGHT if found and name not in anew}
    if "data.image_size" in typed:
        brought.pop("image_size", None)
    elif brought:
        data = {**data, "image_size": brought["image_size"]}
    brought = {name: value for name, value in brought.items() if f"tokenizer.{name}" not in typed}
    return {**values, "data": data, "tokenizer": {**tokenizer, **brought}}


def check_same_architecture(path: str, found: TokenizerConfig, config: Config) -> None:
    """Raises BadInput naming every key in which a checkpoint's architecture differs from the configuration's."""
    names = _differing(found, config)
    if names:
        has = ", ".join(f"{name} {getattr(found, name)}" for name in names)
        wanted = ", ".join(f"tokenizer.{name}, {getattr(config.tokenizer, name)}" for name in names)
        raise BadInput(
            f"tokenizer.checkpoint {path!r} has {has}; expected {wanted}, "
            f"or tokenizer.checkpoint={path} without such keys: it brings its architecture"
        )


def architecture_differs(found: TokenizerConfig, config: Config) -> str:
    """In what a checkpoint's architecture differs from the configuration's, in words; '' where it does not."""
    names = _differing(found, config)
    return ", ".join(f"{name} {getattr(found, name)} instead of {getattr(config.tokenizer, name)}" for name in names)


def _differing(found: TokenizerConfig, config: Config) -> list[str]:
    anew = OF_ENTROPY_MODEL if config.train.parts == "entropy" else ()
    return [n for n in SHAPING if n not in anew and getattr(found, n) != getattr(config.tokenizer, n)]


def load_tokenizer(config: Config) -> "tuple[TaTok, str]":
    """The tokenizer of `tokenizer.checkpoint` and the sha256 of its weights.

    Raises:
        BadInput: it cannot be downloaded, is damaged, or has another architecture than configured.
    """
    from safetensors import SafetensorError

    from tatok_model.tokenizer import TaTok

    folder = tokenizer_folder(config)
    try:
        check_same_architecture(config.tokenizer.checkpoint, read_config(folder), config)
        return TaTok.from_pretrained(folder), sha256_file(folder / "model.safetensors")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"tokenizer.checkpoint {config.tokenizer.checkpoint!r} cannot be loaded ({reason}); "
            "expected config.json and model.safetensors as training wrote them"
        ) from None


def check_quality(config: Config, tokenizer: "TaTok") -> None:
    """Refuse the rule `quality` where this tokenizer cannot predict it, or does not reach it.

    Raises:
        BadInput: not calibrated for the score and rounds, or more dB than all tokens give, at any of the cuts.
    """
    from tatok_model.filtering_rules import line_of

    section = config.filter
    if section.rule != "quality" or not config.tokenizer.patch_tokens:
        return
    line = line_of(tokenizer.quality_lines, section.score, section.rounds)
    if line is None:
        raise BadInput(
            f"filter.rule is 'quality' and tokenizer.checkpoint {config.tokenizer.checkpoint!r} has no line from "
            f"{section.score} in {section.rounds} rounds to dB; expected one that jobs/calibrate.py has fitted"
        )
    for key, cuts in (("filter.threshold", (section.threshold,)), ("evaluate.thresholds", config.evaluate.thresholds)):
        try:
            for decibels in cuts:
                line.check(decibels)
        except ValueError as error:
            raise BadInput(f"{key}: {error}") from None


def tokenizer_sha256(config: Config) -> str:
    """Of the weights of `tokenizer.checkpoint`; raises as `load_tokenizer` where they cannot be loaded."""
    return sha256_file(tokenizer_folder(config) / "model.safetensors")


def quality_lines(config: Config) -> tuple[QualityLine, ...]:
    """Of the tokenizer of `tokenizer.checkpoint`, as calibration left them beside its weights."""
    return read_lines(tokenizer_folder(config) / QUALITY_FILE)


def tokenizer_folder(config: Config) -> Path:
    """The folder on this machine of `tokenizer.checkpoint`; raises as `load_tokenizer` where it cannot be loaded."""
    path = config.tokenizer.checkpoint
    return from_hub(path) if is_hub_id(path) else find(path)


def from_hub(name: str, key: str = "tokenizer.checkpoint") -> Path:
    """Download the tokenizer `name` from the Hugging Face hub; returns its folder on this machine.

    Args:
        name: `owner/name`.
        key: where it was configured, for messages.

    Raises:
        BadInput: it cannot be downloaded.
    """
    from huggingface_hub import HfApi, snapshot_download

    problem: Exception | None = None
    try:  # first: a download that does not begin is tried again for minutes
        within(ANSWER_SECONDS, lambda: HfApi().model_info(name, timeout=10))
    except Exception as error:  # noqa: BLE001 - of its HTTP library, which changes; what was had before may serve
        problem = error
    wanted = ["config.json", "model.safetensors", "quality.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=problem is not None))
    except Exception as error:  # noqa: BLE001 - as above
        reason = next(iter(str(problem or error).splitlines()), "") or type(problem or error).__name__
        raise BadInput(
            f"{key} {name!r} cannot be had from the hub ({reason}); expected a checkpoint folder or a hub id"
        ) from None


def load_lpips(section: str, backbone: str, heads: str, image_size: int) -> "LPIPS":
    """LPIPS with the weights of two files.

    Args:
        section: the keys' beginning, for messages: `evaluate.lpips` or `losses.perceptual`.
        backbone: path of VGG16 or AlexNet weights.
        heads: path of the linear heads.
        image_size: pixels a side of the pictures it will compare.

    Raises:
        BadInput: the files are not such weights, or pictures are too small for the backbone.
    """
    from tatok_model.losses import LPIPS

    try:
        lpips = LPIPS.from_files(backbone, heads)
    except (OSError, ValueError) as error:
        raise BadInput(f"{section}_backbone and {section}_heads: {error}") from None
    smallest = lpips.backbone.smallest
    if image_size < smallest:
        raise BadInput(
            f"data.image_size is {image_size}; expected at least {smallest} pixels for LPIPS with "
            f"{lpips.backbone.name}, or no {section}_backbone"
        )
    return lpips


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _verified(path: Path) -> Checkpoint:
    record = json.loads((path / RECORD).read_text())
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f"its {RECORD} is not of format {FORMAT} version {VERSION}")
    checksums, step = record.get("sha256"), record.get("step")
    if not isinstance(checksums, dict) or not checksums.keys() >= set(WEIGHED) or not isinstance(step, int):
        raise ValueError(f"its {RECORD} lacks the step or checksums of {', '.join(WEIGHED)}")
    for name, checksum in checksums.items():
        if Path(name).name != name or sha256_file(path / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(path, step, record)
