"""Pictures per second of our preprocess stage, against the same work without it.

All contenders read the same JPEG files of 500x375 pixels, made for the run, with as many workers as there are CPUs, and
take turns. The steady rate leaves out what a run costs once, which is told beside it, in seconds. Of those who leave
ranges behind it is counted from when each worker has finished one; the others work on a few pictures and on many in
every round, and it is that of the pictures in between.

- tatok: the stage as a job runs it, from the listing of the source to manifest.json, on Ray.
- its_ranges: the same ranges (checks, split, shard files, checksums) in plain processes, without Ray.
- threads, processes: only decode, resize and encode (`contenders.convert`). Threads are the limit.
- ray_data: Ray Data's documented pipeline for images.
"""

import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.benchmarks.benchmark_inputs import HEIGHT, WIDTH, make_photographs, make_shards
from pipeline.benchmarks.harness import (
    Findings,
    Goal,
    Ratio,
    Spread,
    emptied,
    go_on,
    publish_measured,
    ratio,
    spread_results,
    steady_rate,
    take_turns,
)
from pipeline.core.cluster import connect
from pipeline.core.config import Config, DataConfig
from pipeline.core.console import format_value, progress
from pipeline.core.errors import BadInput
from pipeline.core.ranges import Part, PartMaker
from pipeline.core.run import Run
from pipeline.data.pictures import encode, square
from pipeline.data.preprocess import PreprocessWork, make_plan, open_sources
from pipeline.data.samples import photograph_files
from pipeline.data.shards import ShardDataset

# Others who decode, resize and encode the pictures of a folder: plain threads, processes, Ray Data as documented.

CHUNK = 16  # files that a process is handed at once


def convert(path: Path, data: DataConfig) -> bytes:
    """The bare work on one file: what has to be done whoever does it."""
    with Image.open(path) as picture:
        return encode(square(picture, data.image_size), data.encoding, data.quality)


def convert_all(pool: Executor, files: list[Path], data: DataConfig) -> list[bytes]:
    """The encoded pictures, in order, by threads or processes."""
    return list(pool.map(partial(convert, data=data), files, chunksize=CHUNK))


@contextmanager
def threads(count: int) -> Iterator[Executor]:
    """A pool of plain threads: the limit, as Pillow lets others work while it decodes and resizes."""
    with ThreadPoolExecutor(count) as pool:
        yield pool


@contextmanager
def processes(count: int) -> Iterator[Executor]:
    """A pool of plain processes that share nothing with this one."""
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        yield pool


def on_ray_data(ray: Any, source: Path, folder: Path, data: DataConfig) -> None:
    """Ray Data's documented way from image files to Parquet: `read_images`, `map` with Pillow, `write_parquet`.

    Source: "Working with Images" in the documentation of Ray Data.

    Args:
        ray: the connected module.
        source: folder with the image files.
        folder: for the Parquet files; emptied before.
        data: the size and encoding wanted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    pictures = ray.data.read_images(str(source), mode="RGB", include_paths=True)
    pictures.map(partial(_transform, data=data)).write_parquet(str(folder))


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
class Sample:
    """A folder of pictures and how the stage is to read it."""

    files: list[Path]
    data: DataConfig

    @property
    def folder(self) -> Path:
        """That holds the files."""
        return self.files[0].parent


@dataclass
class Contender:
    """Somebody who makes encoded pictures of a sample."""

    work: Callable[[Sample], Any]
    pictures: Callable[[Any], list[bytes]] | None = None  # of what `work` gave back, in the order of the files' names
    finished: Callable[[Any], list[tuple[float, int]]] | None = None  # likewise, when ranges were done and their sizes
    first: float = 0.0  # seconds of the first call, with a few pictures: what is started and imported is in it
    own: list[float] = field(default_factory=list)  # seconds of each later call beside those of its pictures

    def start(self, few: Sample) -> list[bytes]:
        """Call it for the first time; gives back the pictures."""
        made, self.first = _timed(self.work, few)
        return self.pictures(made) if self.pictures else []

    def rate(self, few: Sample, many: Sample) -> float:
        """Pictures per second, without what a run costs once."""
        made, seconds = _timed(self.work, many)
        if self.finished:
            rate = steady_rate(self.finished(made), _cpus())
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
    """Measure, and leave `report.md` with the table; `Stopped` where the run was asked to stop."""
    publish_measured(run, _measure)


def _measure(run: Run, folder: Path) -> Findings:
    section, workers = run.config.benchmark, _cpus()
    rows = min(run.config.data.rows_per_shard, max(1, section.pictures // (RANGES_PER_WORKER * workers)))
    few = _sample(run.config.data, folder / "few", FEW * workers, FEW)
    many = _sample(run.config.data, folder / "many", section.pictures, rows)
    with ExitStack() as stack:
        thread_pool = stack.enter_context(threads(workers))
        process_pool = stack.enter_context(processes(workers))
        everyone = {
            OURS: Contender(_stage(run.config, folder / "runs"), _stored, _finished),
            RANGES: Contender(_ranges(process_pool, folder / "ranges"), finished=_finished),
            THREADS: _bare(thread_pool),
            PROCESSES: _bare(process_pool),
            RAY_DATA: _documented(folder / "ray"),
        }
        started = {name: contender.start(few) for name, contender in everyone.items()}  # ours first: it starts Ray
        with progress("benchmark", len(everyone) * (section.repeats + 1), "timings") as shown:

            def timed(contender: Contender) -> float:
                go_on(run)
                rate = contender.rate(few, many)
                shown.advance(1)
                return rate

            turns = {name: partial(timed, contender) for name, contender in everyone.items()}
            rates = take_turns(turns, section.repeats)
    return _findings(rates, everyone, _differences(started), _facts(run.config, many, workers))


def _findings(
    rates: dict[str, list[float]], everyone: dict[str, Contender], differences: dict[str, int], facts: dict[str, str]
) -> Findings:
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    numbers: dict[str, float] = {}
    table = [["", "images/s", "lowest", "highest", f"{OURS} / it", "first run s", "a run's own s"]]
    for name, spread in spreads.items():
        own = Spread.of(everyone[name].own).median
        numbers |= spread_results(f"{name}_images_per_second", spread)
        numbers |= {f"{name}_first_run_seconds": everyone[name].first, f"{name}_own_seconds": own}
        values = (spread.median, spread.low, spread.high, spreads[OURS].median / spread.median)
        table.append([name, *map(format_value, values), f"{everyone[name].first:.2f}", f"{own:.2f}"])
    numbers |= {f"largest_difference_{name}": value for name, value in differences.items()}
    ratios = [
        Ratio(f"{one}_to_{other}", ratio(rates[one], rates[other]), f"{one} / {other}, steady rate", goal)
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


def _facts(config: Config, many: Sample, workers: int) -> dict[str, str]:
    data = many.data
    size = sum(path.stat().st_size for path in many.files) / len(many.files)
    return {
        "pictures": f"{len(many.files)} JPEG files of {WIDTH}x{HEIGHT}, {size / 1000:.0f} KB on average",
        "made": f"{data.image_size} pixels, {data.encoding}, {data.rows_per_shard} rows a shard",
        "workers": f"{workers}, as many as CPUs",
        "repeats": str(config.benchmark.repeats),
        "results": "equal encoded pictures from all contenders; tolerance 0 grey levels",
    }


def _sample(data: DataConfig, folder: Path, pictures: int, rows_per_shard: int) -> Sample:
    files = make_photographs(folder, pictures)
    changes: dict[str, Any] = {"source": str(folder), "heldout_source": "", "rows_per_shard": rows_per_shard}
    return Sample(files, dataclasses.replace(data, **changes, num_workers=0))


def _stage(config: Config, folder: Path) -> Callable[[Sample], Path]:
    """The stage, in a new run folder each time; gives that folder back."""

    def work(sample: Sample) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return make_shards(config, sample.data, folder)

    return work


def _stored(folder: Path) -> list[bytes]:
    """The pictures of both splits by name."""
    found: dict[str, bytes] = {}
    for split in ("train", "heldout"):
        dataset = ShardDataset(folder, split)
        found |= zip(dataset.ids(range(len(dataset))), dataset.encoded(range(len(dataset))), strict=True)
    return [found[name] for name in sorted(found)]


def _finished(folder: Path) -> list[tuple[float, int]]:
    """When each range was done, which is when its part was written, and how many pictures it had; in that order."""
    seen = []
    for path in (folder / "parts").glob("*.json"):
        part = Part.from_dict(json.loads(path.read_bytes()))
        rows = sum(shard.rows for shard in part.files.values()) + len(part.rejected or [])
        seen.append((path.stat().st_mtime, rows))
    return sorted(seen)


def _ranges(pool: Executor, folder: Path) -> Callable[[Sample], Path]:
    """What the stage's workers do, handed to plain processes; gives the folder back."""

    def work(sample: Sample) -> Path:
        emptied(folder, "shards", "parts")
        sources = open_sources(sample.data)
        plan = make_plan(sources, sample.data)
        work = PreprocessWork.of(folder, plan, sources, sample.data)
        list(pool.map(PartMaker(work, None, "cpu").part, plan.ranges))
        return folder

    return work


def _bare(pool: Executor) -> Contender:
    return Contender(lambda sample: convert_all(pool, sample.files, sample.data), lambda made: made)


def _documented(folder: Path) -> Contender:
    def work(sample: Sample) -> Path:
        on_ray_data(connect(), sample.folder, folder, sample.data)
        return folder

    def pictures(made: Path) -> list[bytes]:
        rows = pq.read_table(made).sort_by("path")
        return rows.column("image").to_pylist()

    return Contender(work, pictures)


def _differences(made: dict[str, list[bytes]]) -> dict[str, int]:
    """Grey levels by which a contender's pictures differ at most from those of the threads."""
    return {name: max(map(largest_difference, made[name], made[THREADS])) for name in (OURS, PROCESSES, RAY_DATA)}


def _timed(work: Callable[[Sample], Any], sample: Sample) -> tuple[Any, float]:
    started = time.perf_counter()
    made = work(sample)
    return made, time.perf_counter() - started


def _cpus() -> int:
    return os.cpu_count() or 1
