"""The preprocess stage: pictures from anywhere become shards of square RGB pictures.

First the plan (`plan.json`), then one task per range of it on Ray Data, then `rejected.parquet` and `manifest.json`. A
stage as `pipeline/job.py` describes it: `check`, `default_name`, `run`.
"""

import io
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cluster import as_they_finish, check_cpus, connect, most_resources
from pipeline.config import Config
from pipeline.data.manifest import SPLITS, Manifest, Split, fingerprint
from pipeline.data.plan import Plan, Range, make_or_load_plan, open_sources, short_hash
from pipeline.data.ranges import Part, Work, make_part, part_from_dict
from pipeline.data.sources import check_source
from pipeline.errors import BadInput, Stopped
from pipeline.paths import write_atomically, write_json
from pipeline.progress import progress, say
from pipeline.run import Run

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
