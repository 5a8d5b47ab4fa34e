"""Where paths and URLs point, files that appear whole or not at all, and what full storage or memory is reported as.

Relative paths resolve against `TATOK_ROOT`, else the working directory. Inside a submitted Ray job the working
directory may be a temporary copy: a relative output would vanish with it, so it is refused.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.core.config import Config
from pipeline.core.errors import BadInput

INPUT_KEYS = (
    "data.source", "data.heldout_source", "tokenizer.checkpoint", "losses.perceptual_backbone",
    "losses.perceptual_heads", "evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone",
    "evaluate.lpips_heads", "evaluate.blind_checkpoint", "evaluate.more_extractors", "tokens.path",
    "extractor.train_source", "extractor.test_source", "generator.checkpoint", "evaluate.generated",
    "evaluate.extractor", "sweep.checkpoints", "sweep.control",
)  # fmt: skip
TOKENIZERS = ("tokenizer.checkpoint", "sweep.checkpoints", "evaluate.blind_checkpoint")
BOX = Path(str(resources.files("tatok_model"))) / "weights"
OUTPUT_KEYS = ("run.output", "data.shards", "tracking.uri")


def in_the_box(name: str) -> bool:
    """Whether a tokenizer of this name comes with the package, and no folder here is called so."""
    return name in boxed() and not (_root() / name).exists()


def boxed() -> list[str]:
    """As `tatok_model.tokenizer.boxed`, which imports torch."""
    return sorted(path.parent.name for path in BOX.glob("*/config.json"))


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths; URLs and hub ids stay as they are.

    Raises:
        BadInput: a relative output or tracking path in a temporary copy of the working directory.
    """
    for key in INPUT_KEYS + OUTPUT_KEYS:
        section, name = key.split(".")
        config = config.with_values(section, **{name: resolve(key, config.value(key))})
    return config


def resolve(key: str, value: Any) -> Any:
    """The value of one key, as `resolve_paths`."""
    if isinstance(value, tuple):
        return tuple(resolve(key, item) for item in value)
    if key in TOKENIZERS and in_the_box(value):
        return value
    if value == "" or (value == "samples" and key.endswith("source")) or (key, value) == ("tracking.uri", "databricks"):
        return value
    if key == "evaluate.extractor" and not value.endswith(".safetensors"):
        return value  # a name
    if value.startswith("sqlite:///"):
        return "sqlite:///" + _absolute(key, value.removeprefix("sqlite:///"))
    if "://" in value:
        return value
    if key == "tokenizer.checkpoint" and value.count("/") == 1 and not (_root() / value).parent.exists():
        return value  # a hub id
    return _absolute(key, value)


def _absolute(key: str, value: str) -> str:
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    if key in OUTPUT_KEYS and in_temporary_copy() and not os.environ.get("TATOK_ROOT"):
        raise BadInput(
            f"{key} is {value!r}, which would vanish with this job's temporary working directory; "
            "expected an absolute path or URL, or TATOK_ROOT set to a folder that lasts"
        )
    return os.path.normpath(_root() / path)


def _root() -> Path:
    return Path(os.environ.get("TATOK_ROOT") or Path.cwd()).absolute()


def in_temporary_copy() -> bool:
    """True inside a Ray job that was submitted with a working directory: Ray runs it in a copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "working_dir_files" in str(Path.cwd())


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside and rename: a reader sees the old bytes or the new ones, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Indented, sorted, atomic; NaN is written as null, which JSON has no other word for."""
    write_atomically(path, (json.dumps(finite(values), indent=2, sort_keys=True) + "\n").encode())


def finite(values: Any) -> Any:
    """The same nested values with null in place of infinite numbers and NaN."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float) and (values != values or abs(values) == float("inf")):
        return None
    return values


def sha256_file(path: Path) -> str:
    """Checksum of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Paths and URLs behind one interface: a local path or any file system pyarrow knows (s3://, gs://, file://, ...).


@dataclass(frozen=True)
class Location:
    """A file or folder on a file system."""

    filesystem: Any
    path: str

    def __truediv__(self, name: str) -> "Location":
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}" if name else self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> "Location":
        """The folder that holds this."""
        return Location(self.filesystem, str(PurePosixPath(self.path).parent))

    @property
    def is_local(self) -> bool:
        """True on this machine's own file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def info(self) -> fs.FileInfo:
        """Type and size; the type says when nothing is there."""
        return self.filesystem.get_file_info(self.path)

    def open(self) -> Any:
        """A seekable file object for reading bytes."""
        return self.filesystem.open_input_file(self.path)

    def read(self) -> bytes:
        """All bytes of a file."""
        with self.open() as file:
            return file.read()

    def walk(self) -> Iterator[tuple[str, int]]:
        """(path relative to this folder, size in bytes) of every file below, in no order."""
        selector = fs.FileSelector(self.path, recursive=True)
        prefix = len(self.path.rstrip("/")) + 1
        for info in self.filesystem.get_file_info(selector):
            if info.type == fs.FileType.File:
                yield info.path[prefix:], info.size


def locate(place: str) -> Location:
    """The location that a path or URL names.

    Raises:
        BadInput: a URL whose scheme pyarrow does not know, or that is malformed.
    """
    if "://" not in place:
        return Location(fs.LocalFileSystem(), place)
    try:
        filesystem, path = fs.FileSystem.from_uri(place)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BadInput(
            f"{place!r} is not understood ({' '.join(str(error).split())}); expected a path or a URL "
            "such as s3://bucket/folder, gs://bucket/folder or file:///folder"
        ) from None
    return Location(filesystem, path)


# What to say when storage or memory is full: one sentence, whatever library met it first.

STORAGE_CODES = (errno.ENOSPC, errno.EDQUOT)
STORAGE_TEXTS = ("No space left on device", "Disk quota exceeded")  # libraries that keep the text and not the code
MEMORY_TEXTS = ("CUDA out of memory", "can't allocate memory")  # of torch


class OutOfRoom(Exception):
    """Storage or memory is full: the sentence says what to do. Trying again at once would not help. Exit code 1."""


def storage_sentence(problem: BaseException) -> str:
    """What to say where `problem` came of storage that is full; '' where it did not."""
    for cause in _causes(problem):
        full = isinstance(cause, OSError) and cause.errno in STORAGE_CODES
        if full or any(text in str(cause) for text in STORAGE_TEXTS):
            name = getattr(cause, "filename", None)
            place = f" at {str(name)!r}" if name else ""
            return f"storage is full{place}; what was written before is whole: make space, then go on with --resume"
    return ""


def memory_sentence(problem: BaseException, config: Config, section: str) -> str:
    """What to say where a step of the training in `section` did not fit into memory; '' for other problems."""
    import torch

    for cause in _causes(problem):
        if isinstance(cause, torch.OutOfMemoryError) or any(text in str(cause) for text in MEMORY_TEXTS):
            return _smaller(config, section)
    return ""


def _smaller(config: Config, section: str) -> str:
    """The next smaller number of pictures at a time that divides the batch."""
    train = getattr(config, section)
    share = train.global_batch_size // max(train.num_workers, 1)  # of a worker
    now = train.accumulation  # parts of a share
    if section == "train_generator":  # cut by length too, into as many parts as the larger of the two says
        now = max(now, config.generator.length_groups)
    said = (
        f"memory is full with {-(-share // now)} images at a time ({section}.global_batch_size "
        f"{train.global_batch_size}, num_workers {train.num_workers}, a worker's share in {now} parts)"
    )
    smaller = [parts for parts in range(2 * now, share + 1) if share % parts == 0]
    if not smaller:
        return f"{said}; expected a smaller model or larger memory"
    parts = smaller[0]
    return f"{said}; expected fewer: try {section}.accumulation={parts}, {share // parts} at a time, in a new run"


def _causes(problem: BaseException) -> Iterator[BaseException]:
    """The problem and what it came of."""
    seen: set[int] = set()
    cause: BaseException | None = problem
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
