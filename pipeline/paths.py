"""Where relative paths point, and files that appear whole or not at all.

Relative paths resolve against `TATOK_ROOT`, else the working directory. Inside a submitted Ray job the working
directory may be a temporary copy: a relative output would vanish with it, so it is refused.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.errors import BadInput

INPUT_KEYS = (
    "data.source", "data.heldout_source", "tokenizer.checkpoint", "losses.perceptual_backbone",
    "losses.perceptual_heads", "evaluate.inception_weights", "evaluate.reference", "evaluate.lpips_backbone",
    "evaluate.lpips_heads", "evaluate.blind_checkpoint", "evaluate.more_extractors", "tokens.path",
    "extractor.train_source", "extractor.test_source", "generator.checkpoint", "evaluate.generated",
    "evaluate.extractor", "sweep.checkpoints", "sweep.control",
)  # fmt: skip
OUTPUT_KEYS = ("run.output", "data.shards", "tracking.uri")


def resolve_paths(config: Config) -> Config:
    """The configuration with absolute paths; URLs and hub ids stay as they are.

    Raises:
        BadInput: a relative output or tracking path in a temporary copy of the working directory.
    """
    sections: dict[str, dict[str, Any]] = {}
    for key in INPUT_KEYS + OUTPUT_KEYS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        sections.setdefault(section, {})[name] = _resolve(key, value)
    parts = {name: dataclasses.replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(config, **parts)


def _resolve(key: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_resolve(key, item) for item in value)
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
    """Indented, sorted, atomic; not-a-number is written as null, as JSON has no other word for it."""
    write_atomically(path, (json.dumps(finite(values), indent=2, sort_keys=True) + "\n").encode())


def finite(values: Any) -> Any:
    """The same nested values with null in place of infinite and not-a-number."""
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
