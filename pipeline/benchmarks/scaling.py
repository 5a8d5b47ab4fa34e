"""How the data stages scale: with workers, and with pictures.

Workers: pictures per second of preprocess and of tokenize with each number of workers up to the number of CPUs, against
one worker and against as many plain processes, in turns. Timing starts when every worker has finished its first range,
so that it leaves out their start.

Pictures: seconds and peak memory of both stages, run whole by one worker in a fresh process, for each of
`benchmark.sizes`. Tokens are made by an untrained tokenizer: the work does not depend on weights.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread
from pipeline.core.config import Config, DataConfig
from pipeline.core.console import format_value
from pipeline.core.errors import BadInput
from pipeline.core.ranges import PartMaker, Range, Work, make_here, make_on_ray
from pipeline.core.run import Run
from pipeline.data.preprocess import PreprocessWork, make_plan, open_sources
from pipeline.data.preprocess import check as check_preprocess
from pipeline.data.samples import photograph_files
from pipeline.data.shards import read_manifest
from pipeline.tokens.token_manifest import RowRange, stream_of

# A data stage as ranges of work, which our workers or plain processes do.


class Scaled:
    """A stage under test: its work, in a folder that is emptied before each timing, its models and its ranges."""

    def __init__(self, work: Work, models: Any, ranges: Sequence[Range]) -> None:
        self._work, self._models, self._ranges = work, models, ranges
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def ours(self, workers: int) -> Iterator[int]:
        """Yields the picture count of each range as our workers finish it: one in this process, several on Ray."""
        harness.emptied(self._work.folder, *self._work.folders, "parts")
        work = self._work, self._models, self._ranges, "cpu"
        for part in make_here(*work) if workers == 1 else make_on_ray(*work, workers):
            yield self._ranges[part.number].rows

    def plain(self, workers: int) -> Iterator[int]:
        """The same with plain processes, which are kept for the next timing."""
        harness.emptied(self._work.folder, *self._work.folders, "parts")
        if workers not in self._pools:
            context, arguments = get_context("spawn"), (self._work, self._models)
            self._pools[workers] = ProcessPoolExecutor(workers, context, initializer=_load, initargs=arguments)
        for done in as_completed([self._pools[workers].submit(_make, task) for task in self._ranges]):
            yield done.result()

    def close(self) -> None:
        """End the plain processes."""
        for pool in self._pools.values():
            pool.shutdown()


_loaded: list[PartMaker] = []  # global of a plain process: loaded once, makes all its ranges


def _load(work: Work, models: Any) -> None:
    _loaded[:] = [PartMaker(work, models, "cpu")]


def _make(task: Range) -> int:
    _loaded[0].part(task)
    return task.rows


def scaled_preprocess(config: Config, folder: Path) -> Scaled:
    """Preprocess: the pictures of `data.source` to shards, `data.rows_per_shard` in a range."""
    sources = open_sources(config.data)
    plan = make_plan(sources, config.data)
    return Scaled(PreprocessWork.of(folder, plan, sources, config.data), None, plan.ranges)


def scaled_tokenize(config: Config, folder: Path, pictures: int, rows: int) -> Scaled:
    """Tokenize: at most `pictures` of the training split to token files, `rows` in a range."""
    from pipeline.core.checkpoints import load_tokenizer
    from pipeline.tokens.encoder import EncodingWork

    tokenizer, sha256 = load_tokenizer(config)
    tokens = dataclasses.replace(config.tokens, batch_size=min(config.tokens.batch_size, rows), flip=False, crops=0)
    work = EncodingWork(folder, "", config.data.shards, stream_of(config, sha256), tokens, config.train.seed)
    total = min(read_manifest(config.data.shards).splits["train"].rows, pictures)
    ranges = [
        RowRange(number, "train", number, start, min(start + rows, total), total, total)
        for number, start in enumerate(range(0, total, rows))
    ]
    return Scaled(work, tokenizer, ranges)


STAGES = ("preprocess", "tokenize")
OURS, PLAIN = "tatok", "processes"
MOST_MEMORY = Goal(1.2, at_most=True)
RANGES_PER_WORKER = 8

Timings = dict[tuple[str, str, int], list[float]]  # (stage, contender, workers) -> pictures per second, one a round


def check(config: Config) -> None:
    """Refuse what cannot work before anything is made.

    Raises:
        BadInput: no photographs to make pictures from, too few pictures, or fewer than two sizes.
    """
    photograph_files()
    section = config.benchmark
    least = RANGES_PER_WORKER * max(_workers(config))
    if section.pictures < least:
        raise BadInput(f"benchmark.pictures is {section.pictures}; expected at least {least} on this machine")
    if len(set(section.sizes)) < 2:
        raise BadInput(f"benchmark.sizes is {list(section.sizes)}; expected two different numbers of pictures or more")


def run(run: Run) -> None:
    """Measure both and write `report.md`."""
    with harness.scratch(run) as folder:
        harness.publish(run, partial(_measure, run, folder))


def _measure(run: Run, folder: Path) -> Findings:
    config = _with_tokenizer(run.config, folder)
    sizes = [_size(run, config, folder / str(size), size) for size in sorted(set(config.benchmark.sizes))]
    rates = _rates(run, config, folder / "workers")
    facts = {
        "pictures": f"{config.benchmark.pictures} to preprocess and {_tokenized(config)[0]} to tokenize (workers)",
        "made": f"{config.data.image_size} pixels, {config.data.encoding}",
        "tokenizer": f"{config.tokenizer.size}, {config.tokenizer.max_tokens} tokens, untrained, ranked by "
        f"{config.filter.score} in {config.filter.rounds}",
        "repeats": f"{config.benchmark.repeats} (workers), 1 (sizes)",
    }
    return _findings(rates, sizes, facts)


def _with_tokenizer(config: Config, folder: Path) -> Config:
    """The configuration with an untrained tokenizer in `folder`."""
    import torch

    from tatok_model.tokenizer import TaTok

    torch.manual_seed(0)
    place = folder / "tokenizer"
    TaTok(config.tokenizer.architecture()).save_pretrained(place)
    config = config.with_values("tokens", flip=False, crops=0, max_images=0, num_workers=1, split="both")
    return config.with_values("tokenizer", checkpoint=str(place)).with_values("tracking", uri="")  # not to be timed


@dataclasses.dataclass(frozen=True)
class SizeTaken:
    """Time and memory for one number of pictures."""

    pictures: int
    seconds: dict[str, float]  # by stage
    mib: dict[str, float]  # peak memory, by stage


def _size(run: Run, config: Config, folder: Path, pictures: int) -> SizeTaken:
    harness.make_photographs(folder / "pictures", pictures)
    data = dataclasses.replace(config.data, source=str(folder / "pictures"), heldout_source="", num_workers=1)
    named = dataclasses.replace(config, data=dataclasses.replace(data, shards=str(folder / "shards")))
    seconds, mib = {}, {}
    for stage, arguments in (
        ("preprocess", (time_preprocess, config, data, folder / "shards")),
        ("tokenize", (time_tokenize, named, folder / "tokens")),
    ):
        harness.go_on(run)
        seconds[stage], mib[stage] = harness.in_fresh_process(*arguments)
    shutil.rmtree(folder)
    return SizeTaken(pictures, seconds, mib)


def time_preprocess(config: Config, data: DataConfig, folder: Path) -> float:
    """Seconds of the whole stage; runs in a process of its own."""
    check_preprocess(dataclasses.replace(config, data=data))  # so that imports are not timed
    started = time.perf_counter()
    harness.make_shards(config, data, folder)
    return time.perf_counter() - started


def time_tokenize(config: Config, folder: Path) -> float:
    """Seconds of the whole stage; runs in a process of its own."""
    from pipeline.tokens import encoder  # noqa: F401 - so that importing torch is not timed

    started = time.perf_counter()
    harness.run_quietly("tokenize_images", config, folder)
    return time.perf_counter() - started


def _rates(run: Run, config: Config, folder: Path) -> Timings:
    """Time both stages with every number of workers, ours and plain processes taking turns."""
    section, workers = config.benchmark, _workers(config)
    rows = max(1, section.pictures // (RANGES_PER_WORKER * max(workers)))
    harness.make_photographs(folder / "pictures", section.pictures)
    data = dataclasses.replace(
        config.data, source=str(folder / "pictures"), heldout_source="", rows_per_shard=rows, num_workers=0
    )
    shards = harness.make_shards(config, data, folder / "shards")
    config = dataclasses.replace(config, data=dataclasses.replace(data, shards=str(shards)))
    stages: dict[str, Scaled] = {
        "preprocess": scaled_preprocess(config, folder / "preprocess"),
        "tokenize": scaled_tokenize(config, folder / "tokenize", *_tokenized(config)),
    }

    def rate(scaled: Scaled, contender: str, number: int) -> float:
        finished = scaled.ours(number) if contender == OURS else scaled.plain(number)
        return harness.steady_rate([(time.perf_counter(), pictures) for pictures in finished], number)

    rates: Timings = {}
    for stage, scaled in stages.items():
        pairs = [(contender, number) for number in workers for contender in (OURS, PLAIN)]
        rates |= harness.take_turns(run, {(stage, *pair): partial(rate, scaled, *pair) for pair in pairs})
        scaled.close()
    return rates


def _tokenized(config: Config) -> tuple[int, int]:
    """Pictures to tokenize, `benchmark.images` per worker at the most workers, and pictures in a range."""
    pictures = config.benchmark.images * max(_workers(config))
    return pictures, max(1, pictures // (RANGES_PER_WORKER * max(_workers(config))))


def _findings(rates: Timings, sizes: list[SizeTaken], facts: dict[str, str]) -> Findings:
    table = [["", "workers or pictures", "images/s", "lowest", "highest", "efficiency", "peak MiB"]]
    ratios: list[Ratio] = []
    numbers: dict[str, float] = {}
    for (stage, contender, number), values in rates.items():
        spread, alone = Spread.of(values), rates.get((stage, contender, 1))
        name = f"{stage}_{contender}_{number}_workers"
        numbers |= harness.spread_results(f"{name}_images_per_second", spread)
        meaning = f"{number} workers / {number} times one, {contender}"
        gain = Ratio.of(f"{name}_efficiency", values, [number * one for one in alone], meaning) if alone else None
        share = f"{gain.spread.median:.2f}" if gain else ""
        table.append([f"{stage}, {contender}", str(number), *harness.shown(spread), share, ""])
        if gain and number > 1:
            ratios.append(gain)
        if contender == PLAIN:
            name, meaning = f"{stage}_{number}_workers_to_{PLAIN}", f"{OURS} / as many plain processes"
            ratios.append(Ratio.of(name, rates[stage, OURS, number], values, meaning))
    for size in sizes:
        for stage in STAGES:
            rate, mib = size.pictures / size.seconds[stage], size.mib[stage]
            numbers |= {
                f"{stage}_{size.pictures}_images_per_second": rate,
                f"{stage}_{size.pictures}_peak_mib": mib,
            }
            table.append([f"{stage}, whole", str(size.pictures), format_value(rate), "", "", "", f"{mib:.0f}"])
    ratios += _growth(sizes[0], sizes[-1])
    return Findings(table, ratios, numbers, facts)


def _growth(small: SizeTaken, large: SizeTaken) -> Iterator[Ratio]:
    """Ratios of peak memory and of seconds per picture, at the most pictures over the fewest."""
    for stage in STAGES:
        memory = [[size.mib[stage]] for size in (large, small)]
        seconds = [[size.seconds[stage] / size.pictures] for size in (large, small)]
        compared = f"{large.pictures} / {small.pictures} pictures"
        yield Ratio.of(f"{stage}_memory_growth", memory[0], memory[1], f"peak memory, {compared}", MOST_MEMORY)
        yield Ratio.of(f"{stage}_time_growth", seconds[0], seconds[1], f"seconds a picture, {compared}")


def _workers(config: Config) -> list[int]:
    """The configured numbers of workers up to the number of CPUs."""
    return [number for number in sorted(set(config.benchmark.workers)) if number <= (os.cpu_count() or 1)] or [1]
