"""Pictures per second of our preprocess stage, against the same work without it.

All contenders read the same JPEG files of 500x375 pixels, made for the run, with as many workers as there are CPUs, and
take turns. The steady rate leaves out what a run costs once, which is reported beside it. Of those who leave
ranges behind it is counted from when each worker has finished one; the others work on a few pictures and on many in
every round, and it is that of the pictures in between.

- tatok: the stage as a job runs it, from the listing of the source to manifest.json, on Ray.
- its_ranges: the same ranges (checks, split, shard files, checksums) in plain processes, without Ray.
- threads, processes: only decode, resize and encode (`convert`). Threads are the limit.
- ray_data: Ray Data's documented pipeline for images.
"""

import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import HEIGHT, WIDTH, Findings, Goal, Ratio, Spread
from pipeline.core.cluster import connect
from pipeline.core.config import Config, DataConfig
from pipeline.core.errors import BadInput
from pipeline.core.ranges import Part, PartMaker
from pipeline.core.run import Run
from pipeline.data.pictures import encode, square
from pipeline.data.preprocess import PreprocessWork, make_plan, open_sources
from pipeline.data.samples import photograph_files
from pipeline.data.shards import ShardDataset

CHUNK = 16  # files that a process is handed at once


def convert(path: Path, data: DataConfig) -> bytes:
    """The bare work on one file: what has to be done whoever does it."""
    with Image.open(path) as picture:
        return encode(square(picture, data.image_size), data.encoding, data.quality)


def _transform(row: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    pixels: np.ndarray = row["image"]  # (H, W, 3) uint8
    row["image"] = encode(square(Image.fromarray(pixels), data.image_size), data.encoding, data.quality)
    return row


def largest_difference(one: bytes, other: bytes) -> int:
    """Grey levels by which the pixels of two encoded pictures differ at most."""
    if one == other:
        return 0
    first, second = (np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16) for data in (one, other))
    return int(np.abs(first - second).max())


OURS, RANGES, THREADS, PROCESSES, RAY_DATA = "tatok", "its_ranges", "threads", "processes", "ray_data"
GOALS = {THREADS: Goal(0.9), RAY_DATA: Goal(1.5)}
RANGES_PER_WORKER = 16  # so that no worker waits long for the last of them
FEW = 4  # pictures of a range in the small run, which has a range for each worker


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures and how the stage is to read it."""

    files: list[Path]
    data: DataConfig


@dataclass
class PictureMaker:
    """Somebody who makes encoded pictures of a sample."""

    work: Callable[[PictureFolder], Any]
    pictures: Callable[[Any], list[bytes]] | None = None  # of what `work` gave back, in the order of the files' names
    finished: Callable[[Any], list[tuple[float, int]]] | None = None  # likewise, when ranges were done and their sizes
    first: float = 0.0  # seconds of the first call, with a few pictures: what is started and imported is in it
    own: list[float] = field(default_factory=list)  # seconds of each later call beside those of its pictures

    def start(self, few: PictureFolder) -> list[bytes]:
        """Call it for the first time; gives back the pictures."""
        made, self.first = _timed(self.work, few)
        return self.pictures(made) if self.pictures else []

    def rate(self, few: PictureFolder, many: PictureFolder) -> float:
        """Pictures per second, without what a run costs once."""
        made, seconds = _timed(self.work, many)
        if self.finished:
            rate = harness.steady_rate(self.finished(made), _cpus())
        else:
            _, start = _timed(self.work, few)
            # Where a machine stumbles, the whole run is a lower bound of the rate.
            between = len(many.files) - len(few.files)
            rate = between / (seconds - start) if seconds > start else len(many.files) / seconds
        self.own.append(max(seconds - len(many.files) / rate, 0.0))
        return rate


def check(config: Config) -> None:
    """Refuse what cannot work; makes nothing.

    Raises:
        BadInput: too few pictures to tell a rate from a start, or no photographs to make them from.
    """
    photograph_files()
    least = 4 * FEW * _cpus()
    if config.benchmark.pictures < least:
        raise BadInput(f"benchmark.pictures is {config.benchmark.pictures}; expected at least {least} on this machine")


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table."""
    with harness.scratch(run) as folder:
        harness.publish(run, partial(_measure, run, folder))


def _measure(run: Run, folder: Path) -> Findings:
    section, workers = run.config.benchmark, _cpus()
    rows = min(run.config.data.rows_per_shard, max(1, section.pictures // (RANGES_PER_WORKER * workers)))
    few = _sample(run.config.data, folder / "few", FEW * workers, FEW)
    many = _sample(run.config.data, folder / "many", section.pictures, rows)
    with ExitStack() as stack:
        thread_pool = stack.enter_context(ThreadPoolExecutor(workers))  # the limit: Pillow lets other threads work
        process_pool = stack.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))
        everyone = {
            OURS: PictureMaker(_stage(run.config, folder / "runs"), _stored, _finished),
            RANGES: PictureMaker(_ranges(process_pool, folder / "ranges"), finished=_finished),
            THREADS: _bare(thread_pool),
            PROCESSES: _bare(process_pool),
            RAY_DATA: _documented(folder / "ray"),
        }
        started = {name: contender.start(few) for name, contender in everyone.items()}  # ours first: it starts Ray
        rates = harness.take_turns(run, {name: partial(maker.rate, few, many) for name, maker in everyone.items()})
    # Grey levels by which a contender's pictures differ at most from those of the threads.
    differences = {
        name: max(map(largest_difference, started[name], started[THREADS])) for name in (OURS, PROCESSES, RAY_DATA)
    }
    size = sum(path.stat().st_size for path in many.files) / len(many.files)
    facts = {
        "pictures": f"{len(many.files)} JPEG files of {WIDTH}x{HEIGHT}, {size / 1000:.0f} KB on average",
        "made": f"{many.data.image_size} pixels, {many.data.encoding}, {many.data.rows_per_shard} rows a shard",
        "workers": f"{workers}, as many as CPUs",
        "repeats": str(section.repeats),
        "results": "equal encoded pictures from all contenders; tolerance 0 grey levels",
    }
    return _findings(rates, everyone, differences, facts)


def _findings(
    rates: dict[str, list[float]], everyone: dict[str, PictureMaker], differences: dict[str, int], facts: dict[str, str]
) -> Findings:
    numbers = harness.rate_results(rates)
    header, *lines = harness.rate_table(rates, OURS)
    table = [[*header, "first run s", "a run's own s"]]
    for line in lines:
        name = line[0]
        own = Spread.of(everyone[name].own).median
        numbers |= {f"{name}_first_run_seconds": everyone[name].first, f"{name}_own_seconds": own}
        table.append([*line, f"{everyone[name].first:.2f}", f"{own:.2f}"])
    numbers |= {f"largest_difference_{name}": value for name, value in differences.items()}
    ratios = [
        Ratio.of(f"{one}_to_{other}", rates[one], rates[other], f"{one} / {other}, steady rate", goal)
        for one, other, goal in (
            *((OURS, name, GOALS.get(name)) for name in (THREADS, RAY_DATA, PROCESSES, RANGES)),
            (RANGES, THREADS, None),
        )
    ]
    start = everyone[OURS].first - numbers[f"{OURS}_own_seconds"]
    conclusion = (
        f"start-up: {start:.1f} s once for {OURS} (Ray and its workers), {numbers[f'{OURS}_own_seconds']:.1f} s a run; "
        f"pixels differ from {THREADS} by at most {max(differences.values())} grey levels (tolerance: 0)"
    )
    return Findings(table, ratios, numbers | {"startup_seconds": start}, facts, conclusion)


def _sample(data: DataConfig, folder: Path, pictures: int, rows_per_shard: int) -> PictureFolder:
    files = harness.make_photographs(folder, pictures)
    changes: dict[str, Any] = {"source": str(folder), "heldout_source": "", "rows_per_shard": rows_per_shard}
    return PictureFolder(files, dataclasses.replace(data, **changes, num_workers=0))


def _stage(config: Config, folder: Path) -> Callable[[PictureFolder], Path]:
    """The stage, in a new run folder each time; gives that folder back."""

    def work(sample: PictureFolder) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return harness.make_shards(config, sample.data, folder)

    return work


def _stored(folder: Path) -> list[bytes]:
    """The pictures of both splits by name."""
    encoded: dict[str, bytes] = {}
    for split in ("train", "heldout"):
        dataset = ShardDataset(folder, split)
        encoded |= zip(dataset.ids(range(len(dataset))), dataset.encoded(range(len(dataset))), strict=True)
    return [encoded[name] for name in sorted(encoded)]


def _finished(folder: Path) -> list[tuple[float, int]]:
    """When each range was done, which is when its part was written, and how many pictures it had; in that order."""
    seen = []
    for path in (folder / "parts").glob("*.json"):
        part = Part.from_dict(json.loads(path.read_bytes()))
        rows = sum(shard.rows for shard in part.files.values()) + len(part.rejected or [])
        seen.append((path.stat().st_mtime, rows))
    return sorted(seen)


def _ranges(pool: Executor, folder: Path) -> Callable[[PictureFolder], Path]:
    """What the stage's workers do, handed to plain processes; gives the folder back."""

    def work(sample: PictureFolder) -> Path:
        harness.emptied(folder, "shards", "parts")
        sources = open_sources(sample.data)
        plan = make_plan(sources, sample.data)
        work = PreprocessWork.of(folder, plan, sources, sample.data)
        list(pool.map(PartMaker(work, None, "cpu").part, plan.ranges))
        return folder

    return work


def _bare(pool: Executor) -> PictureMaker:
    """Threads or processes."""
    convert_all = partial(pool.map, chunksize=CHUNK)
    return PictureMaker(lambda sample: list(convert_all(partial(convert, data=sample.data), sample.files)), list)


def _documented(folder: Path) -> PictureMaker:
    """Ray Data's documented way from image files to Parquet: `read_images`, `map` with Pillow, `write_parquet`.

    Source: "Working with Images" in the documentation of Ray Data.
    """

    def work(sample: PictureFolder) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        pictures = connect().data.read_images(str(sample.files[0].parent), mode="RGB", include_paths=True)
        pictures.map(partial(_transform, data=sample.data)).write_parquet(str(folder))
        return folder

    return PictureMaker(work, lambda made: pq.read_table(made).sort_by("path").column("image").to_pylist())


def _timed(work: Callable[[PictureFolder], Any], sample: PictureFolder) -> tuple[Any, float]:
    started = time.perf_counter()
    made = work(sample)
    return made, time.perf_counter() - started


def _cpus() -> int:
    return os.cpu_count() or 1
