"""How the data stages scale: with workers, and with pictures.

Workers: pictures per second of preprocess and of tokenize with each number of workers that there are CPUs for, against
one worker and against as many plain processes, in turns. The clock runs from when every worker has finished its first
range, so that starting workers is not in it.

Pictures: seconds and peak memory of both stages, run whole by one worker in a fresh process, for each of
`benchmark.sizes`. Tokens are made by an untrained tokenizer: the work does not depend on weights.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.benchmarking.memory import in_fresh_process
from pipeline.benchmarking.photographs import make_photographs
from pipeline.benchmarking.scaled import Preprocess, Scaled, Tokenize
from pipeline.benchmarking.scratch import publish_measured
from pipeline.benchmarking.shards import make_shards, run_quietly
from pipeline.benchmarking.table import Findings, Goal, Ratio, spread_results
from pipeline.benchmarking.timing import Spread, go_on, ratio, steady_rate, take_turns
from pipeline.config import Config, DataConfig
from pipeline.data.preprocess import check as check_preprocess
from pipeline.errors import BadInput
from pipeline.evaluation.report import format_value
from pipeline.progress import progress
from pipeline.run import Run
from pipeline.samples import photograph_files

STAGES = ("preprocess", "tokenize")
OURS, PLAIN = "tatok", "processes"
MOST_MEMORY = Goal(1.2, at_most=True)
RANGES_PER_WORKER = 8

Timings = dict[tuple[str, str, int], list[float]]  # rates by stage, contender, workers


def check(config: Config) -> None:
    """Refuse what cannot work; makes nothing.

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
    """Measure, and leave `report.md` with the table; `Stopped` where the run was asked to stop."""
    publish_measured(run, _measure)


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
    tokens = dataclasses.replace(config.tokens, flip=False, crops=0, max_images=0, num_workers=1, split="both")
    tokenizer = dataclasses.replace(config.tokenizer, checkpoint=str(place))
    tracking = dataclasses.replace(config.tracking, uri="")  # of the stages that are measured
    return dataclasses.replace(config, tokenizer=tokenizer, tokens=tokens, tracking=tracking)


@dataclasses.dataclass(frozen=True)
class Size:
    """What one number of pictures took."""

    pictures: int
    seconds: dict[str, float]  # by stage
    mib: dict[str, float]  # by stage


def _size(run: Run, config: Config, folder: Path, pictures: int) -> Size:
    make_photographs(folder / "pictures", pictures)
    data = dataclasses.replace(config.data, source=str(folder / "pictures"), heldout_source="", num_workers=1)
    named = dataclasses.replace(config, data=dataclasses.replace(data, shards=str(folder / "shards")))
    seconds, mib = {}, {}
    for stage, arguments in (
        ("preprocess", (preprocess, config, data, folder / "shards")),
        ("tokenize", (tokenize, named, folder / "tokens")),
    ):
        go_on(run)
        seconds[stage], mib[stage] = in_fresh_process(*arguments)
    shutil.rmtree(folder)
    return Size(pictures, seconds, mib)


def preprocess(config: Config, data: DataConfig, folder: Path) -> float:
    """Seconds of the whole stage; runs in a process of its own."""
    check_preprocess(dataclasses.replace(config, data=data))  # imports
    started = time.perf_counter()
    make_shards(config, data, folder)
    return time.perf_counter() - started


def tokenize(config: Config, folder: Path) -> float:
    """Seconds of the whole stage; runs in a process of its own."""
    from pipeline.tokenizing import encoding, stage  # noqa: F401 - torch, before the clock runs

    started = time.perf_counter()
    run_quietly("tokenize_images", stage, config, folder)
    return time.perf_counter() - started


def _rates(run: Run, config: Config, folder: Path) -> Timings:
    section, workers = config.benchmark, _workers(config)
    rows = max(1, section.pictures // (RANGES_PER_WORKER * max(workers)))
    make_photographs(folder / "pictures", section.pictures)
    data = dataclasses.replace(
        config.data, source=str(folder / "pictures"), heldout_source="", rows_per_shard=rows, num_workers=0
    )
    shards = make_shards(config, data, folder / "shards")
    config = dataclasses.replace(config, data=dataclasses.replace(data, shards=str(shards)))
    stages: dict[str, Scaled] = {
        "preprocess": Preprocess(config, folder / "preprocess"),
        "tokenize": Tokenize(config, folder / "tokenize", *_tokenized(config)),
    }
    rates: Timings = {}
    with progress("benchmark", len(stages) * 2 * len(workers) * (section.repeats + 1), "timings") as shown:

        def timed(stage: str, contender: str, number: int) -> float:
            go_on(run)
            scaled = stages[stage]
            ranges = (scaled.ours if contender == OURS else scaled.plain)(number)
            rate = steady_rate([(time.perf_counter(), pictures) for pictures in ranges], number)
            shown.advance(1)
            return rate

        for stage, scaled in stages.items():
            every = [(stage, contender, number) for number in workers for contender in (OURS, PLAIN)]
            rates |= take_turns({key: partial(timed, *key) for key in every}, section.repeats)
            scaled.close()
    return rates


def _tokenized(config: Config) -> tuple[int, int]:
    """Pictures to make tokens of, `benchmark.images` for each worker, and those of a range."""
    pictures = config.benchmark.images * max(_workers(config))
    return pictures, max(1, pictures // (RANGES_PER_WORKER * max(_workers(config))))


def _findings(rates: Timings, sizes: list[Size], facts: dict[str, str]) -> Findings:
    table = [["", "workers or pictures", "images/s", "lowest", "highest", "efficiency", "peak MiB"]]
    ratios: list[Ratio] = []
    numbers: dict[str, float] = {}
    for (stage, contender, number), values in rates.items():
        spread, alone = Spread.of(values), rates.get((stage, contender, 1))
        name = f"{stage}_{contender}_{number}_workers"
        numbers |= spread_results(f"{name}_images_per_second", spread)
        gain = ratio(values, [number * one for one in alone]) if alone else None
        share = f"{gain.median:.2f}" if gain else ""
        values_told = map(format_value, (spread.median, spread.low, spread.high))
        table.append([f"{stage}, {contender}", str(number), *values_told, share, ""])
        if gain and number > 1:
            ratios.append(Ratio(f"{name}_efficiency", gain, f"{number} workers / {number} times one, {contender}"))
        if contender == PLAIN:
            versus = ratio(rates[stage, OURS, number], values)
            ratios.append(Ratio(f"{stage}_{number}_workers_to_{PLAIN}", versus, f"{OURS} / as many plain processes"))
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


def _growth(small: Size, large: Size) -> Iterator[Ratio]:
    """Of memory and of time for a picture, from the fewest to the most pictures."""
    for stage in STAGES:
        mib = large.mib[stage] / small.mib[stage]
        seconds = (large.seconds[stage] / large.pictures) / (small.seconds[stage] / small.pictures)
        told = f"{large.pictures} / {small.pictures} pictures"
        yield Ratio(f"{stage}_memory_growth", _once(mib), f"peak memory, {told}", MOST_MEMORY)
        yield Ratio(f"{stage}_time_growth", _once(seconds), f"seconds a picture, {told}")


def _once(value: float) -> Spread:
    return Spread(value, value, value)


def _workers(config: Config) -> list[int]:
    """The numbers of workers that there are CPUs for."""
    return [number for number in sorted(set(config.benchmark.workers)) if number <= (os.cpu_count() or 1)] or [1]
