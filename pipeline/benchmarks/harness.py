"""What benchmarks share: fair timings, findings for people and programs, and the pictures and tokenizers they take.

One `Findings` becomes `results` of summary.json, a line of metrics.jsonl, `report.md` and a table in the terminal.
"""

import dataclasses
import io
import itertools
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from pipeline.core.config import Config, DataConfig
from pipeline.core.console import Row, columns, format_value, markdown, progress, say, terminal_table
from pipeline.core.errors import Stopped
from pipeline.core.files import write_atomically
from pipeline.core.inputs import with_input
from pipeline.core.run import Run
from pipeline.core.stages import find_stage
from pipeline.data.checks import check_pictures
from pipeline.data.samples import PHOTOGRAPHS, photograph_files
from pipeline.data.shards import MEMORY_BYTES, ShardDataset, read_manifest
from pipeline.tracking import Tracker

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.training.order import Batches
    from tatok_model.tokenizer import TaTok

# The time on a device, and what it is called.


def now(device: Any) -> float:
    """Seconds, when everything asked of a `torch.device` is done."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_facts(device: Any) -> dict[str, str]:
    """Name and threads of a `torch.device`, for the report; `gpu` where it is one."""
    import torch

    if device.type != "cuda":
        return {"device": "CPU", "threads": str(torch.get_num_threads())}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "gpu": name}


# How much memory work takes: the peak of a fresh process that does nothing else.

MIB = 2**20


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `work(*arguments)` gives back, and the peak of resident memory in MiB of the new process it ran in.

    `work` stands at the top of a module, and arguments can be pickled.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result(), pool.submit(_peak).result()


def _peak() -> float:
    """Of this process, in MiB.

    Not `ru_maxrss` where it can be helped: on Linux a process inherits that of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


# Fair timings: contenders take turns, so that a machine that slows down slows all of them; medians are compared.

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Of several measurements of one thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def go_on(run: Run) -> None:
    """Raise Stopped where the run was asked to stop; called before each timing."""
    if run.should_stop:
        raise Stopped("the benchmark was asked to stop; --resume measures anew")


def take_turns(run: Run, contenders: Mapping[K, Callable[[], float]]) -> dict[K, list[float]]:
    """What each contender measures of itself, once before to warm up and then `benchmark.repeats` times.

    Every round calls all of them, in an order that is turned round from one round to the next.

    Raises:
        Stopped: the run was asked to stop.
    """
    names, repeats = list(contenders), run.config.benchmark.repeats
    rounds = [names, *(names if number % 2 == 0 else names[::-1] for number in range(repeats))]
    measured: dict[K, list[float]] = {name: [] for name in names}
    with progress("benchmark", len(names) * len(rounds), "timings") as shown:
        for name in itertools.chain(*rounds):
            go_on(run)
            measured[name].append(contenders[name]())
            shown.advance(1)
    return {name: values[1:] for name, values in measured.items()}


def steady_rate(finished: list[tuple[float, int]], workers: int) -> float:
    """Pictures per second from when each of the workers has finished a range: starting them is not in it.

    `finished` says when a range was done, in seconds, and its pictures; in order, more of them than workers.
    """
    begun = workers - 1  # the range whose end starts the clock
    return sum(pictures for _, pictures in finished[begun + 1 :]) / (finished[-1][0] - finished[begun][0])


@dataclass(frozen=True)
class Goal:
    """What a ratio is to be, at least or at most."""

    limit: float
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side."""
        return value <= self.limit if self.at_most else value >= self.limit

    def in_words(self, value: float) -> str:
        """The goal and by how much it is missed, if it is."""
        wanted = f"goal: {'at most' if self.at_most else 'at least'} {self.limit:g}"
        return f"{wanted}, met" if self.is_met(value) else f"{wanted}, missed by {abs(value - self.limit):.2f}"


@dataclass(frozen=True)
class Ratio:
    """Ours over another's, taken side by side."""

    name: str  # in summary.json
    spread: Spread
    meaning: str  # what over what
    goal: Goal | None = None

    @classmethod
    def of(cls, name: str, ours: list[float], others: list[float], meaning: str, goal: Goal | None = None) -> "Ratio":
        """Of rates, one a round, over another's in the same rounds: what slowed a whole round down is in both."""
        return cls(name, Spread.of([one / other for one, other in zip(ours, others, strict=True)]), meaning, goal)

    def row(self) -> Row:
        """As a line of the report."""
        middle, low, high = self.spread.median, self.spread.low, self.spread.high
        goal = f"; {self.goal.in_words(middle)}" if self.goal else ""
        return Row(self.name, middle, f"{self.meaning}; {low:.3g} to {high:.3g}{goal}")


@dataclass
class Findings:
    """Everything that one benchmark has to say."""

    table: list[list[str]]  # a header, then a line for each contender
    ratios: list[Ratio] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)  # further results, by name
    facts: dict[str, str] = field(default_factory=dict)  # what the numbers depend on
    conclusion: str = ""  # a line below the tables

    def results(self) -> dict[str, float]:
        """For summary.json: the ratios with their lowest and highest, and the other numbers."""
        results = dict(self.numbers)
        for ratio in self.ratios:
            results |= spread_results(ratio.name, ratio.spread)
        return results


def spread_results(name: str, spread: Spread) -> dict[str, float]:
    """A median under `name` and its extremes beside it."""
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def rate_results(rates: Mapping[str, list[float]]) -> dict[str, float]:
    """Images per second of each contender, with the extremes."""
    results: dict[str, float] = {}
    for name, values in rates.items():
        results |= spread_results(f"{name}_images_per_second", Spread.of(values))
    return results


def rate_table(rates: Mapping[str, list[float]], ours: str) -> list[list[str]]:
    """A line for each contender: images per second, the extremes, and ours over its."""
    spreads = {name: Spread.of(values) for name, values in rates.items()}
    header = ["", "images/s", "lowest", "highest", f"{ours} / it"]
    lines = [[name, *shown(it), f"{spreads[ours].median / it.median:.2f}"] for name, it in spreads.items()]
    return [header, *lines]


def shown(spread: Spread) -> list[str]:
    """Median, lowest and highest, for a table."""
    return [format_value(value) for value in (spread.median, spread.low, spread.high)]


def publish(run: Run, measure: Callable[[], Findings], tags: dict[str, str] | None = None) -> None:
    """Measure; fill `run.results`, log them, write `report.md` and show the table."""
    with Tracker.start(run, tags) as tracker:
        findings = measure()
        run.results = findings.results()
        run.rewind_metrics(-1)  # a resumed run measures anew
        run.log(run.results, step=0)
        rows = [ratio.row() for ratio in findings.ratios]
        title = f"{run.config.preset}: {run.config.benchmark.kind}"
        conclusion = f"\n{findings.conclusion}\n" if findings.conclusion else ""
        page = markdown(title, rows, [], findings.facts, findings.table) + conclusion
        path = run.folder / "report.md"
        write_atomically(path, page.encode())
        run.outputs["report"] = str(path)
        tracker.artifact(path)
        say(columns(findings.table))
        if rows:
            say(terminal_table(title, rows, []))
        if findings.conclusion:
            say(findings.conclusion)


# Folders that a benchmark works in, which leave nothing behind.


@contextmanager
def scratch(run: Run) -> Iterator[Path]:
    """A new folder in the run's, not made yet, that goes when the benchmark ends, however it ends."""
    folder = run.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def emptied(folder: Path, *names: str) -> None:
    """Make the folder anew, with folders of these names and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)


# Pictures: those that the configuration names, else JPEG files of 500x375 pixels, the size of a usual ImageNet picture,
# cut from the photographs inside scikit-image.

WIDTH, HEIGHT = 500, 375
DISTINCT = 512  # different files; further ones are links to these: who reads them has the same work to do


def make_photographs(folder: Path, count: int) -> list[Path]:
    """`count` files 000000.jpg, 000001.jpg, ... in a new folder, in the order of their names.

    Raises:
        BadInput: scikit-image is not installed, or without one of its photographs.
    """
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.jpg" for number in range(count)]
    with ThreadPoolExecutor() as threads:
        for path, data in zip(files, threads.map(photograph, range(min(count, DISTINCT))), strict=False):
            path.write_bytes(data)
    for path, first in zip(files[DISTINCT:], itertools.cycle(files[:DISTINCT]), strict=False):
        os.link(first, path)
    return files


def photograph(number: int) -> bytes:
    """One such file."""
    random = np.random.default_rng([0, number])
    whole = _open(sorted(PHOTOGRAPHS)[number % len(PHOTOGRAPHS)])
    width = random.uniform(0.8, 1) * min(whole.width, whole.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = random.uniform(0, whole.width - width), random.uniform(0, whole.height - height)
    box = (left, top, left + width, top + height)
    picture = whole.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(random.integers(85, 97)))
    return file.getvalue()


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _open(name: str) -> Image.Image:
    with Image.open(photograph_files()[name]) as picture:
        return picture.convert("RGB")


def names_pictures(config: Config) -> bool:
    """Whether there are shards or a source."""
    return bool(config.data.shards or config.data.source)


def check_named(config: Config) -> None:
    """Refuse pictures that cannot be used.

    Raises:
        BadInput: as `check_pictures`; none are named and there are no photographs to make them of.
    """
    if names_pictures(config):
        check_pictures(config)
    else:
        photograph_files()


def take_pictures(run: Run, folder: Path, heldout_fraction: float) -> None:
    """Give the run `data.shards`, and say in its inputs what they are.

    Where no pictures are named, photographs are made in `folder`, a new one, of which a fraction is held out.
    """
    if names_pictures(run.config):
        run.config = with_input(run.config, "data.shards")
    else:
        make_photographs(folder / "photographs", run.config.benchmark.pictures)
        made = {"source": str(folder / "photographs"), "heldout_source": "", "heldout_fraction": heldout_fraction}
        config = run.config.with_values("data", **made)
        run.config = config.with_values("data", shards=str(run_quietly("preprocess", config, folder / "shards")))
    place = run.config.data.shards
    run.inputs["shards"] = {"path": place, "sha256": read_manifest(place).fingerprint}


def make_shards(config: Config, data: DataConfig, folder: Path) -> Path:
    """Preprocess what `data` names, with the rest of `config`, in a new run folder; gives that folder back."""
    return run_quietly("preprocess", dataclasses.replace(config, data=data), folder)


def run_quietly(name: str, config: Config, folder: Path) -> Path:
    """Run the stage of this name, untracked, in a new run folder, without a word; gives that folder back."""
    config = config.with_values("run", output=str(folder.parent), name=folder.name).with_values("tracking", uri="")
    run = Run.open(name, config, folder.name, resume=False)
    try:
        with redirect_stderr(io.StringIO()):  # what it says is not for the reader of a benchmark
            find_stage(name).run(run)
    finally:
        run.close()
    return folder


# The tokenizer that a benchmark times, and what it is trained on.


def tokenizer_of(run: Run) -> "TaTok":
    """The trained one where the configuration names it, which is said in the run's inputs, else one of fresh weights.

    Raises:
        BadInput: the checkpoint cannot be used.
    """
    import torch

    from pipeline.core.checkpoints import load_tokenizer
    from tatok_model.tokenizer import TaTok

    section = run.config.tokenizer
    if section.checkpoint:
        tokenizer, sha256 = load_tokenizer(run.config)
        run.inputs["tokenizer"] = {"path": section.checkpoint, "sha256": sha256}
    else:
        torch.manual_seed(0)
        tokenizer = TaTok(section.architecture())
    return tokenizer.eval()


def training_batches(config: Config, memory_bytes: int = MEMORY_BYTES) -> "Batches":
    """Our reader on the training split, kept in memory up to a size, as a worker that trains alone has it."""
    from pipeline.training.order import Batches, SampleOrder
    from tatok_model.kept_sets import LANES

    train = config.train
    pictures = ShardDataset(config.data.shards, "train", memory_bytes)
    order = SampleOrder(len(pictures), train.seed, train.global_batch_size, local=not pictures.in_memory)
    return Batches(pictures, order, 0, 1, train.horizontal_flip, LANES + config.tokenizer.patch_positions)
