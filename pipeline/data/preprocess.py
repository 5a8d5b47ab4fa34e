"""The preprocess stage: pictures from anywhere become shards of square RGB pictures.

First the plan (`plan.json`), then one task per range of it on Ray Data, then `rejected.parquet` and `manifest.json`. A
stage as `pipeline/core/job.py` describes it: `check`, `default_name`, `run`.
"""

import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.cluster import as_they_finish, check_cpus, connect, most_resources
from pipeline.core.config import Config, DataConfig
from pipeline.core.console import progress, say
from pipeline.core.errors import BadInput, Stopped
from pipeline.core.files import sha256_file, write_atomically, write_json
from pipeline.core.manifest import check_unchanged
from pipeline.core.run import Run
from pipeline.data.listing import Picture, RawLabel, Scan, Unit
from pipeline.data.pictures import BadPicture, prepare, without_global_limits
from pipeline.data.shards import SPLITS, Manifest, Shard, ShardWriter, Split, fingerprint
from pipeline.data.sources import Source, check_source, open_source, read, scan

# The plan of a preprocess run: which pictures go into which shard, decided before any work and kept as `plan.json`.

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
    begun, wanted = ({f"data.{key}": value for key, value in c.items()} for c in (plan.config, byte_config(data)))
    check_unchanged(begun, wanted, folder)
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


# The work of one task: read one range of the plan, check and resize its pictures, write its shards.

READ_AHEAD = 64  # pictures that threads share at a time


@dataclass(frozen=True)
class Work:
    """What the tasks of one run have in common."""

    folder: Path  # run folder, on a file system that all workers share
    key: str  # of the plan
    classes: list[str]
    sources: list[Source]
    data: DataConfig


@dataclass(frozen=True)
class Part:
    """What one range became."""

    key: str  # of the plan
    number: int  # of the range
    shards: dict[str, Shard]  # by split; a split without pictures has none
    rejected: list[tuple[str, str]]  # (path, reason)


def part_from_dict(values: dict[str, Any]) -> Part:
    """The part that `dataclasses.asdict` made plain."""
    shards = {split: Shard(**shard) for split, shard in values["shards"].items()}
    return Part(values["key"], values["number"], shards, [(path, reason) for path, reason in values["rejected"]])


def make_part(task: Range, work: Work, threads: int = 1) -> tuple[Part, bool]:
    """Do the work of one range, unless it is done; returns the part and whether it was made now.

    Args:
        task: the range.
        work: of the run.
        threads: that share it; the bytes do not depend on how many.
    """
    path = work.folder / "parts" / f"{task.number:05d}.json"
    part = _finished(path, work)
    if part:
        return part, False
    part = _make(task, work, threads)
    write_json(path, asdict(part))
    return part, True


def _make(task: Range, work: Work, threads: int) -> Part:
    rejected = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(work.folder, f"shards/{split}-{task.number:05d}.parquet"))
            for split in SPLITS
        }
        pool = None
        if threads > 1:  # Pillow lets others work while it decodes and resizes
            stack.enter_context(without_global_limits())
            pool = stack.enter_context(ThreadPoolExecutor(threads))
        for name, split, row in _rows(task, work, pool):
            if isinstance(row, BadPicture):
                rejected.append((name, str(row)))
            else:
                writers[split].add(row)
    shards = {split: writer.shard for split, writer in writers.items() if writer.shard}
    return Part(work.key, task.number, shards, rejected)


def _rows(
    task: Range, work: Work, pool: ThreadPoolExecutor | None
) -> Iterator[tuple[str, str, dict[str, Any] | BadPicture]]:
    """Name, split, and row or what is wrong, of every picture, in order; few are in memory at a time."""
    indices = {name: index for index, name in enumerate(work.classes)}

    def make(picture: Picture) -> tuple[str, str, dict[str, Any] | BadPicture]:
        try:
            row = _row(picture, label_of(picture.label, indices), work)
        except BadPicture as reason:
            return picture.id, "", reason
        split = split_of(picture.data, work.data.heldout_fraction) if task.split == BY_HASH else task.split
        return picture.id, split, row

    pictures = read(work.sources[task.source], task.units, work.data)
    if pool is None:
        yield from map(make, pictures)
        return
    while some := list(islice(pictures, READ_AHEAD)):
        yield from pool.map(make, some)


def split_of(data: bytes, heldout_fraction: float) -> str:
    """The split of a picture, by a hash of the file: equal files land in the same split, at every image size."""
    draw = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    return "heldout" if draw < heldout_fraction else "train"


def _row(picture: Picture, label: int, work: Work) -> dict[str, Any]:
    if picture.problem:
        raise BadPicture(picture.problem)
    size = work.data.image_size
    return {
        "id": picture.id,
        "image": prepare(picture.data, work.data),
        "height": size,
        "width": size,
        "label": label,
        "label_name": work.classes[label] if label >= 0 else "",
    }


def _finished(path: Path, work: Work) -> Part | None:
    """The part that an earlier attempt left, if it is of this plan and its shards are whole."""
    if not path.exists():
        return None
    part = part_from_dict(json.loads(path.read_bytes()))
    whole = all(_is_whole(work.folder / shard.file, shard) for shard in part.shards.values())
    return part if part.key == work.key and whole else None


def _is_whole(path: Path, shard: Shard) -> bool:
    return path.is_file() and sha256_file(path) == shard.sha256


REJECTED = pa.schema({"path": pa.string(), "reason": pa.string()})


def check(config: Config) -> None:
    """Refuse what cannot work.

    Raises:
        BadInput: a source is missing or holds no picture, both sources are the same, or more workers than CPUs.
    """
    data = config.data
    check_source("data.source", data.source, data)
    if data.heldout_source:
        check_source("data.heldout_source", data.heldout_source, data)
    if data.heldout_source == data.source:
        raise BadInput(
            f"data.heldout_source is data.source, {data.source!r}; expected other pictures, or '' to split by hash"
        )
    check_cpus("data.num_workers", data.num_workers)


def default_name(config: Config) -> str:
    """The run folder's name: the same for equal shards, so that training finds what preprocess made."""
    return f"{config.preset}-shards-{short_hash(config.data)}"


def run(run: Run) -> None:
    """Make the shards in the run folder, or what is missing of them.

    Raises:
        BadInput: the source cannot be used, has changed since the run was begun, or has no good picture at all.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    data = run.config.data
    sources = open_sources(data)
    for key, source in zip(("source", "heldout_source"), sources, strict=False):
        run.inputs[key] = {"path": source.place, "sha256": source.fingerprint()}
    plan = make_or_load_plan(run.folder, sources, data)
    _prepare_folder(run.folder)
    work = Work(run.folder, plan.key, plan.classes, [source.without_listing() for source in sources], data)
    parts, speed = _make_parts(run, plan, work)
    manifest = _write_results(run.folder, plan, parts)
    _report(run, manifest, speed)


def _prepare_folder(folder: Path) -> None:
    """Make the folders and remove what a killed worker was in the middle of."""
    for name in ("shards", "parts"):
        (folder / name).mkdir(exist_ok=True)
        for leftover in (folder / name).glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _make_parts(run: Run, plan: Plan, work: Work) -> tuple[list[Part], float]:
    """All parts in the order of the plan, and how many pictures a second were worked on."""
    workers = work.data.num_workers
    results: Iterator[tuple[Part, bool]]
    if workers == 1 or len(plan.ranges) == 1:  # needs no Ray
        results = (make_part(task, work, workers or os.cpu_count() or 1) for task in plan.ranges)
    else:
        results = make_on_ray(connect(), plan.ranges, work)
    parts: dict[int, Part] = {}
    made = 0
    started = time.monotonic()
    with progress("preprocess", sum(task.rows for task in plan.ranges), "images") as shown:
        for part, is_new in results:
            parts[part.number] = part
            rows = plan.ranges[part.number].rows
            made += rows if is_new else 0
            shown.advance(rows)
            if run.should_stop and len(parts) < len(plan.ranges):
                raise Stopped(f"{len(parts)} of {len(plan.ranges)} shards are made; --resume makes the others")
    return [parts[task.number] for task in plan.ranges], made / (time.monotonic() - started)


def make_on_ray(ray: Any, ranges: list[Range], work: Work) -> Iterator[tuple[Part, bool]]:
    """Results of `make_part` as they come, from Ray Data actors.

    Not from tasks: Ray Data sees only every 0.1 seconds, twice for each, that one is over, and the CPU waits for that
    long. An actor has its next range at hand.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts pictures
    items = [{"task": json.dumps(vars(task))} for task in ranges]
    rows = ray.data.from_items(items, override_num_blocks=len(items))  # one block is one range
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it would warn that its progress bars are off
    parts = rows.map(RangeActor, fn_kwargs={"work": work}, num_cpus=1, compute=_pool(ray, len(items), work))
    for row in as_they_finish(parts):
        yield part_from_dict(json.loads(row["part"])), row["is_new"]


def _pool(ray: Any, ranges: int, work: Work) -> Any:
    """As many actors as are asked for, else one for each CPU, those that the cluster may grow by included."""
    # Ray leaves out what there is none of: a head node without CPUs, before its workers come, has no such entry.
    there, most = (int(found.get("CPU", 0)) for found in (ray.cluster_resources(), most_resources(ray)))
    if work.data.num_workers:
        there = most = min(work.data.num_workers, most)
    sizes = {"min_size": max(1, min(there, ranges)), "max_size": max(1, min(most, ranges))}
    return ray.data.ActorPoolStrategy(**sizes, max_tasks_in_flight_per_actor=2)


class RangeActor:
    """Lives in a process of its own and makes one range after the other."""

    def __call__(self, row: dict[str, Any], work: Work) -> dict[str, Any]:
        """`make_part` as Ray Data calls it: rows of plain values."""
        part, is_new = make_part(Range(**json.loads(row["task"])), work)
        return {"part": json.dumps(asdict(part)), "is_new": is_new}


def _write_results(folder: Path, plan: Plan, parts: list[Part]) -> Manifest:
    """Write `rejected.parquet`, then `manifest.json`, which marks the shards as complete."""
    rejected = [{"path": path, "reason": reason} for part in parts for path, reason in part.rejected]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rejected, REJECTED), file, compression="ZSTD")
    write_atomically(folder / "rejected.parquet", file.getvalue())
    splits = {}
    for name in SPLITS:
        shards = tuple(part.shards[name] for part in parts if name in part.shards)
        splits[name] = Split(sum(shard.rows for shard in shards), shards)
    manifest = Manifest(
        image_size=plan.config["image_size"],
        config=plan.config,
        source_fingerprint=plan.source_fingerprint,
        classes=tuple(plan.classes),
        splits=splits,
        rejected=len(rejected),
        fingerprint=fingerprint(splits),
    )
    if not splits["train"].rows:
        raise BadInput(f"no picture for training: {_told(manifest)}; expected some, see {folder / 'rejected.parquet'}")
    write_json(folder / "manifest.json", manifest.to_dict())
    return manifest


def _report(run: Run, manifest: Manifest, speed: float) -> None:
    run.outputs = {
        "shards": str(run.folder),
        "manifest": str(run.folder / "manifest.json"),
        "rejected": str(run.folder / "rejected.parquet"),
    }
    run.results = {
        "rows_train": manifest.splits["train"].rows,
        "rows_heldout": manifest.splits["heldout"].rows,
        "rejected": manifest.rejected,
        "images_per_second": round(speed, 1),
    }
    rate = f", {speed:.0f} images/s" if speed else ""  # 0: everything was there already
    say(f"preprocess: {_told(manifest)}{rate} -> {run.folder}")
    if not manifest.splits["heldout"].rows:
        say("warning: nothing is held out; expected a larger data.heldout_fraction or a data.heldout_source")


def _told(manifest: Manifest) -> str:
    train, heldout = (manifest.splits[name].rows for name in SPLITS)
    return f"{train} training and {heldout} held-out images, {manifest.rejected} rejected"
