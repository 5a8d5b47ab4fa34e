"""JSON files that say what a folder holds: read with one sentence where they are missing, foreign or unreadable.

Each names its `format` and `version`; what else it holds is its own module's business.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.core.config import Config
from pipeline.core.errors import BadInput
from pipeline.core.files import locate

T = TypeVar("T")  # a dataclass


def read_described(folder: str | Path, name: str, writer: str, key: str = "") -> Any:
    """The values in file `name` of a folder, a path or URL, which the job `writer` makes and `key` may name.

    Raises:
        BadInput: there is none, or it is no JSON.
    """
    place = str(folder)
    try:
        return json.loads((locate(place, key) / name).read())
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{place!r} holds no {name}; expected a folder written by {writer}") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{name} in {place!r} cannot be read ({' '.join(str(error).split())})") from None


def check_format(values: Any, what: str, format_and_version: tuple[str, int], writer: str, oldest: int = 0) -> None:
    """Refuse values from JSON that another program than the job `writer` made, or another version of it.

    Args:
        values: of the file or metadata that `what` names in messages.
        what: see `values`.
        format_and_version: that are wanted.
        writer: the job that writes them.
        oldest: the first version that can still be read; 0: only the one that is wanted.

    Raises:
        BadInput: naming the format or version found.
    """
    wanted, version = format_and_version
    if not isinstance(values, dict) or values.get("format") != wanted:
        raise BadInput(f"{what} is not of format {wanted!r}; expected one by {writer}")
    if values.get("version") not in range(oldest or version, version + 1):
        expected = f"{oldest} to {version}" if oldest else version
        raise BadInput(f"{what} has version {values.get('version')!r}; expected {expected}")


def parse_values(kind: type[T], values: Any, what: str) -> T:
    """The dataclass that values from JSON make; keys that it does not have are left out.

    Raises:
        BadInput: naming `what` they are of and the first key that is missing or of another type.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{what} is damaged ({f'{where}: ' * bool(where)}{first['msg']})") from None


FREE = {  # keys of a training's section that may change between attempts: they do not decide what a step does
    "num_workers", "device", "compile", "max_steps", "max_minutes", "log_every", "validate_every", "validation_images",
    "grid_images", "checkpoint_every", "keep_checkpoints", "max_failures", "cpus_per_worker", "fused",
    "min_workers", "not_finite", "parallel",
}  # fmt: skip
INPUTS = {  # keys whose value is kept as a fingerprint where it decides bytes: names in `inputs` of summary.json
    "data.shards": "shards", "tokenizer.checkpoint": "tokenizer", "tokens.path": "tokens",
    "generator.checkpoint": "generator",
}  # fmt: skip


def values_of(config: Config, *sections: str) -> dict[str, Any]:
    """The values of some sections by `section.key`, without those that may change between attempts."""
    values = config.to_dict()
    training = ("train", "train_generator")
    return {
        f"{section}.{key}": value
        for section in sections
        for key, value in values[section].items()
        if section not in training or key not in FREE
    }


def fingerprint(made_of: dict[str, Any]) -> str:
    """Eight digits that tell runs apart that are made of different things."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:8]


def check_unchanged(
    begun: dict[str, Any],
    wanted: dict[str, Any],
    folder: Path | None = None,
    names: dict[str, tuple[str, str]] | None = None,
) -> None:
    """Refuse to go on with other values than a run was begun with.

    Args:
        begun: what the run was begun with, by `section.key`; a key that there was not yet had its default.
        wanted: what it is to go on with.
        folder: of the run, to be named in the message.
        names: what people call inputs that are told apart by a fingerprint: then ("" unknown) and now.

    Raises:
        BadInput: naming the first key that differs.
    """
    defaults = Config().to_dict()
    for key, value in wanted.items():
        section, _, name = key.partition(".")
        before, now = begun.get(key, defaults.get(section, {}).get(name)), value
        if before == now:
            continue
        if key in INPUTS and names:
            before, now = names[key]
        if before == now or before == "":  # other pictures or weights under one name, or under one nobody knows
            begun_by = f"the run in {str(folder)!r}" if folder else "this run"
            raise BadInput(
                f"{key} {now!r} is not, or no longer, what {begun_by} was begun with; expected that, or a new run.name"
            )
        if folder:
            raise BadInput(
                f"{key} is {now!r}, but the run in {str(folder)!r} was begun with {before!r}; "
                "expected the same, or a new run.name"
            )
        raise BadInput(f"{key} is {now!r}; expected {before!r}, as this run was begun, or a new run.name")
