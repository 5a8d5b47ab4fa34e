"""The plan of a preprocess run: which pictures go into which shard, decided before any work and kept as `plan.json`.

Because every range of the source has its own task and its own files, the bytes do not depend on how many workers there
are, and a run that was killed goes on with the ranges that are missing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig
from pipeline.data.listing import RawLabel, Scan, Unit
from pipeline.data.sources import Source, open_source, scan
from pipeline.errors import BadInput
from pipeline.paths import write_atomically

BYTE_KEYS = (  # of the data section, beside the sources themselves
    "image_size", "heldout_fraction", "rows_per_shard", "max_pixels", "encoding", "quality",
    "image_column", "label_column", "class_name_column",
)  # fmt: skip
BY_HASH = "by_hash"


@dataclass(frozen=True)
class Range:
    """What one task makes one shard of, or two when the split is by hash."""

    number: int  # over both sources; names the files
    source: int  # index into the list of sources
    split: str  # train | heldout | by_hash
    rows: int  # pictures
    units: list[Unit]


@dataclass(frozen=True)
class Plan:
    """All ranges, and what they were made from."""

    config: dict[str, Any]
    source_fingerprint: str
    classes: list[str]
    ranges: list[Range]

    @property
    def key(self) -> str:
        """Parts of the work carry it, so that parts of different plans are never mixed."""
        return _sha256([self.config, self.source_fingerprint, self.classes])


def byte_config(data: DataConfig) -> dict[str, Any]:
    """The data keys that decide bytes, without the places of the sources."""
    return {key: getattr(data, key) for key in BYTE_KEYS}


def short_hash(data: DataConfig) -> str:
    """8 hexadecimal digits that tell configurations with different shards apart."""
    return _sha256([byte_config(data), data.source, data.heldout_source])[:8]


def open_sources(data: DataConfig) -> list[Source]:
    """The source and, if there is one, the held-out source; raises as `open_source`."""
    sources = [open_source("data.source", data.source, data)]
    if data.heldout_source:
        sources.append(open_source("data.heldout_source", data.heldout_source, data))
    return sources


def make_or_load_plan(folder: Path, sources: list[Source], data: DataConfig) -> Plan:
    """The plan in `folder`, else a new one that is written there.

    Raises:
        BadInput: the plan that is there was made from another source or with another configuration, or as `make_plan`.
    """
    path = folder / "plan.json"
    if not path.exists():
        plan = make_plan(sources, data)
        write_atomically(path, json.dumps(vars(plan), default=vars).encode())  # asdict would copy every unit
        return plan
    values = json.loads(path.read_bytes())
    plan = Plan(**{**values, "ranges": [Range(**part) for part in values["ranges"]]})
    for key, value in byte_config(data).items():
        if plan.config.get(key) != value:
            raise BadInput(
                f"data.{key} is {value!r}, but the run in {str(folder)!r} was begun with {plan.config.get(key)!r}; "
                "expected the same value, or a new run.name"
            )
    if plan.source_fingerprint != _fingerprint(sources):
        raise BadInput(
            f"data.source {sources[0].place!r} (or data.heldout_source) has changed since the run in {str(folder)!r} "
            "was begun; expected the same files, or a new run.name"
        )
    return plan


def make_plan(sources: list[Source], data: DataConfig) -> Plan:
    """Look at the sources and deal their pictures out.

    Raises:
        BadInput: a source holds no picture, or their classes do not agree.
    """
    ranges: list[Range] = []
    scans = []
    for index, (key, source) in enumerate(zip(("data.source", "data.heldout_source"), sources, strict=False)):
        found = scan(key, source, data)
        split = BY_HASH if len(sources) == 1 else ("train", "heldout")[index]
        for units, rows in zip(found.ranges, found.rows, strict=True):
            ranges.append(Range(len(ranges), index, split, rows, units))
        scans.append(found)
    return Plan(byte_config(data), _fingerprint(sources), class_names(scans), ranges)


def class_names(scans: list[Scan]) -> list[str]:
    """The name of every class index over all sources; names without indices are numbered in their sorted order.

    Raises:
        BadInput: an index has two names, or a name has no index although other classes have one.
    """
    indexed: dict[int, str] = {}
    for label, name in (item for found in scans for item in found.indexed.items()):
        known = indexed.get(label) or name
        if name and known != name:
            raise BadInput(
                f"class {label} is {known!r} in data.source and {name!r} in data.heldout_source; expected one name"
            )
        indexed[label] = known
    names = sorted(set().union(*(found.names for found in scans)))
    if not indexed:
        return names
    table = [indexed.get(label) or str(label) for label in range(max(indexed) + 1)]
    for name in names:
        if name not in table:
            raise BadInput(f"class {name!r} has no index, but others have; expected indices for all or for none")
    return table


def label_of(raw: RawLabel, indices: dict[str, int]) -> int:
    """Class index of a raw label; -1 for none."""
    if isinstance(raw, str):
        return indices[raw]
    return -1 if raw is None or raw < 0 else raw


def _fingerprint(sources: list[Source]) -> str:
    return _sha256([source.fingerprint() for source in sources])


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
