"""The preprocess stage: pictures from anywhere become shards of square RGB pictures.

First the plan (`plan.json`: which pictures go into which shard), then the shards of each range of it, then
`rejected.parquet` and `manifest.json`.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.cluster import check_machine
from pipeline.core.config import Config, DataConfig
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.files import OURS, printable, write_atomically
from pipeline.core.manifest import check_unchanged, fingerprint
from pipeline.core.ranges import Part, Stopwatch, run_ranges
from pipeline.core.run import Run
from pipeline.data.labels import class_names, label_of
from pipeline.data.pictures import BadPicture, prepare, without_global_limits
from pipeline.data.scans import LeftOut, Picture, Unit
from pipeline.data.shards import SPLITS, Manifest, ShardDataset, ShardWriter, write_manifest, write_rejected
from pipeline.data.sources import Source, check_source, open_source, read, scan
from pipeline.tracking import Tracker, check_tracking

BYTE_KEYS = (  # of the data section, beside the sources themselves
    "image_size", "heldout_fraction", "rows_per_shard", "max_pixels", "encoding", "quality",
    "image_column", "label_column", "class_name_column",
)  # fmt: skip
BY_HASH = "by_hash"
MOST_LINES = 5  # of a kind, where there may be one a picture
MOST_CLASSES = 20  # whose names are told
READ_AHEAD = 64  # pictures that threads share at a time


def check(config: Config) -> None:
    """Refuse what cannot work.

    Raises:
        BadInput: a source is missing or holds no picture, both sources are the same, more workers than CPUs, a tracking
            address of unknown form.
    """
    data = config.data
    for key, place in _places(data).items():
        check_source(key, place, data)
    if data.heldout_source == data.source:
        raise BadInput(
            f"data.heldout_source is data.source, {data.source!r}; expected other pictures, or '' to split by hash"
        )
    check_machine("data", data)
    check_tracking(config)


def default_name(config: Config) -> str:
    """The run folder's name: the same for equal shards, another one when files have changed."""
    return f"{config.preset}-shards-{fingerprint(made_of(config))}"


def asked_for(config: Config) -> dict[str, Any]:
    """What decides which shards are made, but for what is in the sources."""
    data = config.data
    places = {"data.source": data.source, "data.heldout_source": data.heldout_source}
    return {**places, **{f"data.{key}": value for key, value in byte_config(data).items()}}


def made_of(config: Config) -> dict[str, Any]:
    """What decides which shards are made; lists the sources, and raises as `open_source`."""
    return {**asked_for(config), "files": _fingerprint(open_sources(config.data))}


def run(run: Run) -> None:
    """Make the shards in the run folder, or what is missing of them.

    Raises:
        BadInput: the source cannot be used, has changed since the run was begun, or has no good picture at all.
        Stopped: the run was asked to stop; finished ranges are kept.
    """
    data = run.config.data
    sources = open_sources(data)
    for source in sources:
        run.inputs[source.key.removeprefix("data.")] = {"path": source.place, "sha256": source.fingerprint()}
    plan = make_or_load_plan(run.folder, sources, data)
    run.made_of = {**asked_for(run.config), "files": plan.source_fingerprint}
    work = PreprocessWork.of(run.folder, plan, sources, data)
    with Tracker.start(run, {"source_fingerprint": plan.source_fingerprint}) as tracker:
        parts, seconds = run_ranges(run, "preprocess", work, None, plan.ranges, "data", "shards")
        manifest = _write_results(run.folder, plan, parts)
        new = sum(plan.ranges[part.number].rows for part in parts if part.seconds)
        _report(run, manifest, new / seconds)
        tracker.artifact(run.folder / "manifest.json")


@dataclass(frozen=True)
class PictureRange:
    """Pictures of a source that become one shard, or two when the split is by hash; see `ranges.Range`."""

    number: int  # over both sources; names the files
    source: int  # index into the list of sources
    split: str  # train | heldout | by_hash
    rows: int  # pictures
    units: list[Unit]


@dataclass(frozen=True)
class PicturePlan:
    """All ranges, and what they were made from: `plan.json`."""

    config: dict[str, Any]
    source_fingerprint: str
    classes: list[str]
    ranges: list[PictureRange]
    left_out: LeftOut = field(default_factory=list)  # what may be pictures and is in no range

    @property
    def key(self) -> str:
        """What parts of the work carry."""
        return _sha256([self.config, self.source_fingerprint, self.classes])


def byte_config(data: DataConfig) -> dict[str, Any]:
    """The data keys that decide bytes, without the places of the sources."""
    return {key: getattr(data, key) for key in BYTE_KEYS}


def open_sources(data: DataConfig) -> list[Source]:
    """The source and, if there is one, the held-out source; raises as `open_source`."""
    return [open_source(key, place, data) for key, place in _places(data).items()]


def _places(data: DataConfig) -> dict[str, str]:
    return {"data.source": data.source} | ({"data.heldout_source": data.heldout_source} if data.heldout_source else {})


def make_or_load_plan(folder: Path, sources: list[Source], data: DataConfig) -> PicturePlan:
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
    plan = PicturePlan(**{**values, "ranges": [PictureRange(**part) for part in values["ranges"]]})
    begun, wanted = ({f"data.{key}": at for key, at in keys.items()} for keys in (plan.config, byte_config(data)))
    check_unchanged(begun, wanted, folder)
    if plan.source_fingerprint != _fingerprint(sources):
        raise BadInput(
            f"data.source {sources[0].place!r} (or data.heldout_source) has changed since the run in {str(folder)!r} "
            "was begun; expected the same files, or a new run.name"
        )
    return plan


def make_plan(sources: list[Source], data: DataConfig) -> PicturePlan:
    """Look at the sources and deal their pictures out.

    Raises:
        BadInput: a source holds no picture, or their classes do not agree.
    """
    scans = [scan(source, data) for source in sources]
    ranges: list[PictureRange] = []
    for index, (looked, split) in enumerate(zip(scans, SPLITS if len(scans) > 1 else [BY_HASH], strict=True)):
        for units, rows in zip(looked.ranges, looked.rows, strict=True):
            ranges.append(PictureRange(len(ranges), index, split, rows, units))
    classes = class_names(
        (item for looked in scans for item in looked.indexed.items()),
        (name for looked in scans for name in looked.names),
    )
    warnings = [warning for looked in scans for warning in looked.warnings]
    for warning in warnings[:MOST_LINES]:
        say(f"warning: {warning}")
    if len(warnings) > MOST_LINES:
        say(f"warning: the like {len(warnings) - MOST_LINES} times more")
    left_out = [(printable(path), printable(reason)) for looked in scans for path, reason in looked.left_out]
    ours = [path for path, reason in left_out if reason == OURS]
    if ours:  # no pictures of the source, and more after every run
        say(f"left out, as jobs wrote it: {', '.join(ours[:MOST_LINES])}{', ...' if len(ours) > MOST_LINES else ''}")
        left_out = [(path, reason) for path, reason in left_out if reason != OURS]
    return PicturePlan(byte_config(data), _fingerprint(sources), classes, ranges, left_out)


def _fingerprint(sources: list[Source]) -> str:
    return _sha256([source.fingerprint() for source in sources])


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PreprocessWork:
    """How a range becomes shards: read its pictures, check and resize them, write; see `ranges.Work`."""

    folder: Path
    key: str
    classes: list[str]
    sources: list[Source]
    data: DataConfig
    threads: int  # that share a range; the bytes do not depend on how many
    folders: ClassVar[tuple[str, ...]] = ("shards",)

    @classmethod
    def of(cls, folder: Path, plan: PicturePlan, sources: list[Source], data: DataConfig) -> "PreprocessWork":
        """Of a plan; threads of this process share what is only one range."""
        threads = (data.num_workers or os.cpu_count() or 1) if len(plan.ranges) == 1 else 1
        return cls(folder, plan.key, plan.classes, [source.without_listing() for source in sources], data, threads)

    def worker(self, models: None, device: str) -> Callable[[PictureRange], Part]:
        """Needs no model."""
        return self.make

    def make(self, task: PictureRange) -> Part:
        """The shards of one range."""
        rejected, watch = [], Stopwatch("cpu")
        with watch.timed("total"), ExitStack() as stack:
            writers = {
                split: stack.enter_context(ShardWriter(self.folder, f"shards/{split}-{task.number:05d}.parquet"))
                for split in SPLITS
            }
            pool = None
            if self.threads > 1:  # Pillow lets others work while it decodes and resizes
                stack.enter_context(without_global_limits())
                pool = stack.enter_context(ThreadPoolExecutor(self.threads))
            for name, split, row in self._rows(task, pool):
                if isinstance(row, BadPicture):
                    rejected.append((name, str(row)))
                else:
                    writers[split].add(row)
        shards = {split: writer.shard for split, writer in writers.items() if writer.shard}
        return Part(self.key, task.number, shards, rejected, watch.seconds)

    def _rows(
        self, task: PictureRange, pool: ThreadPoolExecutor | None
    ) -> Iterator[tuple[str, str, dict[str, Any] | BadPicture]]:
        """Name, split, and row or what is wrong, of every picture, in order; few are in memory at a time."""
        indices = {name: index for index, name in enumerate(self.classes)}

        def make(picture: Picture) -> tuple[str, str, dict[str, Any] | BadPicture]:
            try:
                row = self._row(picture, label_of(picture.label, indices))
            except BadPicture as reason:
                return picture.id, "", reason
            split = split_of(picture.data, self.data.heldout_fraction) if task.split == BY_HASH else task.split
            return picture.id, split, row

        pictures = read(self.sources[task.source], task.units, self.data)
        if pool is None:
            yield from map(make, pictures)
            return
        while some := list(islice(pictures, READ_AHEAD)):
            yield from pool.map(make, some)

    def _row(self, picture: Picture, label: int) -> dict[str, Any]:
        if picture.problem:
            raise BadPicture(picture.problem)
        size = self.data.image_size
        return {
            "id": picture.id,
            "image": prepare(picture.data, self.data),
            "height": size,
            "width": size,
            "label": label,
            "label_name": self.classes[label] if label >= 0 else "",
        }


def split_of(data: bytes, heldout_fraction: float) -> str:
    """The split of a picture, by a hash of the file: equal files land in the same split, at every image size."""
    draw = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64
    return "heldout" if draw < heldout_fraction else "train"


def _write_results(folder: Path, plan: PicturePlan, parts: list[Part]) -> Manifest:
    """Write `rejected.parquet`, then `manifest.json`, which marks the shards as complete."""
    rejected = plan.left_out + [rejection for part in parts for rejection in part.rejected or []]
    shards = [shard for part in parts for shard in part.files.items()]
    facts = plan.config, plan.source_fingerprint, tuple(plan.classes)
    manifest = Manifest.of(plan.config["image_size"], *facts, shards, len(rejected))
    if not manifest.splits["train"].rows:
        write_rejected(folder, rejected)
        first = f" ({rejected[0][0]}: {rejected[0][1]})" if rejected else ""
        raise BadInput(
            f"no picture for training: {_row_counts(manifest)}{first}; expected some, see {folder / 'rejected.parquet'}"
        )
    write_manifest(folder, manifest, rejected)
    return manifest


def _report(run: Run, manifest: Manifest, speed: float) -> None:
    run.outputs = {
        "shards": str(run.folder),
        "manifest": str(run.folder / "manifest.json"),
        "rejected": str(run.folder / "rejected.parquet"),
    }
    counts = count_labels(run.folder)
    run.results = {
        "rows_train": manifest.splits["train"].rows,
        "rows_heldout": manifest.splits["heldout"].rows,
        "rows_labelled": sum(counts.values()),
        "classes": len(counts),
        "rejected": manifest.rejected,
        "images_per_second": round(speed, 1),
    }
    run.rewind_metrics(-1)  # a resumed run measures anew
    run.log(run.results, step=0)
    rate = f", {speed:.0f} images/s" if speed else ""  # 0: everything was there already
    say(f"preprocess: {_row_counts(manifest)}{rate}")
    for line in [*_told_labels(counts, manifest), *_told_rejections(run.folder)]:
        say(line)
    if not manifest.splits["heldout"].rows:
        say("warning: nothing is held out; expected a larger data.heldout_fraction or a data.heldout_source")


def count_labels(folder: Path) -> dict[int, int]:
    """Class index -> pictures of both splits, in order, without those that have none."""
    labels = [ShardDataset(folder, split, memory_bytes=0) for split in SPLITS]
    indices, counts = np.unique(
        np.concatenate([found.labels(range(len(found))) for found in labels]), return_counts=True
    )
    return {int(index): int(count) for index, count in zip(indices, counts, strict=True) if index >= 0}


def _told_labels(counts: dict[int, int], manifest: Manifest) -> list[str]:
    labelled, images = sum(counts.values()), sum(split.rows for split in manifest.splits.values())
    if not labelled:
        return ["labels: no image has one"]
    classes = [(index, manifest.classes[index]) for index in counts]
    told = [f"{index}={name}" if name != str(index) else name for index, name in classes[:MOST_CLASSES]]
    more = ", ..." if len(classes) > MOST_CLASSES else ""
    number = f"{len(classes)} classes" if len(classes) > 1 else "1 class"
    lines = [f"labels: {labelled} of {images} images have one, in {number}: {', '.join(told)}{more}"]
    if labelled < images:
        lines.append(f"warning: no label for {images - labelled} of {images} images; expected one for all or for none")
    return lines


def _told_rejections(folder: Path) -> list[str]:
    """A line for each of the frequent reasons, with an example."""
    table = pq.read_table(folder / "rejected.parquet").to_pylist()
    kinds = [re.sub(r"'[^']*'|\d+", "", row["reason"]) for row in table]  # alike but for names and numbers
    first = dict(zip(reversed(kinds), reversed(table), strict=True))
    frequent = Counter(kinds).most_common()
    counts = [(count, first[kind]) for kind, count in frequent[:MOST_LINES]]
    lines = [f"rejected: {count}, as {row['path']}: {row['reason']}" for count, row in counts]
    return lines + ([f"rejected: for {len(frequent) - MOST_LINES} reasons more"] if len(frequent) > MOST_LINES else [])


def _row_counts(manifest: Manifest) -> str:
    train, heldout = (manifest.splits[name].rows for name in SPLITS)
    return f"{train} training and {heldout} held-out images, {manifest.rejected} rejected"
