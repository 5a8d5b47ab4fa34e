"""Pictures per second into the training loop from shards, against a loop that gets the same batch again and again.

Both take the same optimiser steps of the configured tokenizer, in turns; what our reader costs is the difference. It
reads a split that is kept in memory, as small ones are, and one that is read from its files, as large ones are. The
steps have neither perceptual nor adversarial terms, so that they hide less of the reading.
"""

import itertools
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.benchmarks import harness
from pipeline.benchmarks.harness import Findings, Goal, Ratio, Spread
from pipeline.core.cluster import pick_device, uses_bf16
from pipeline.core.config import Config
from pipeline.core.run import Run
from pipeline.data.shards import MEMORY_BYTES

if TYPE_CHECKING:  # torch is imported inside functions: `check` answers without it
    from pipeline.training.order import Batch, Batches
    from pipeline.training.tokenizer_training import TokenizerObjective

MEMORY, FILES, MOCK = "in_memory", "from_files", "mock"
BYTES_IN_MEMORY = {MEMORY: MEMORY_BYTES, FILES: 0}
GOAL = Goal(0.95)


def check(config: Config) -> None:
    """Refuse what cannot work; reads no pictures.

    Raises:
        BadInput: pictures that cannot be used, or a GPU that is not there.
    """
    harness.check_named(config)
    if config.train.device == "cuda":  # else torch need not be imported
        pick_device("train", config.train.device)


@dataclass
class BatchSource:
    """A source of batches and what was seen of it, over all timings."""

    batches: "Batches | None"  # None: the mock
    next_step: int = 0  # the reader goes on where it was, through the epochs
    waits: list[float] = field(default_factory=list)  # seconds for a batch, without the first of a timing


def run(run: Run) -> None:
    """Measure, and leave `report.md` with the table."""
    with harness.scratch(run) as folder:
        harness.take_pictures(run, folder, run.config.data.heldout_fraction)
        run.config = _reduced(run.config)
        harness.publish(run, partial(_measure, run))


def _reduced(config: Config) -> Config:
    """Without terms that need weights or networks of their own, in one process."""
    config = config.with_values("losses", perceptual=0.0, gan=0.0).with_values("tokenizer", checkpoint="")
    return config.with_values("train", num_workers=0, min_workers=0, compile=False, parts="all")


def _measure(run: Run) -> Findings:
    config = run.config
    section, train = config.benchmark, config.train
    device = pick_device("train", train.device)
    steps = -(-section.images // train.global_batch_size)
    objective = _objective(config, run.folder, device)
    everyone = {name: BatchSource(harness.training_batches(config, size)) for name, size in BYTES_IN_MEMORY.items()}
    everyone[MOCK] = BatchSource(None)
    same = harness.training_batches(config, MEMORY_BYTES).load(0)
    turns = {name: partial(_rate, source, objective, same, steps, device) for name, source in everyone.items()}
    rates = harness.take_turns(run, turns)
    starts = {name: _first_batch_seconds(config, size) for name, size in BYTES_IN_MEMORY.items()}
    readers = {name: harness.in_fresh_process(read_epoch, config, size) for name, size in BYTES_IN_MEMORY.items()}
    _, idle = harness.in_fresh_process(read_epoch, config, None)
    facts = {
        "device": str(device),
        "shards": f"{len(everyone[MEMORY].batches.pictures)} training pictures"  # type: ignore[union-attr]
        f" of {config.data.image_size} pixels, {config.data.encoding}",
        "steps a timing": f"{steps} of {train.global_batch_size} pictures, {config.tokenizer.size}",
        "repeats": str(section.repeats),
        "waits": f"{sum(len(everyone[name].waits) for name in BYTES_IN_MEMORY)} batches",
    }
    table = [["", "images/s", "lowest", "highest", "it / mock", "p99 wait ms", "first batch s"]]
    numbers, ratios = harness.rate_results(rates), []
    for name, values in rates.items():
        waits = everyone[name].waits
        late = float(np.quantile(waits, 0.99)) if waits else 0.0
        versus = Ratio.of(f"{name}_to_{MOCK}", values, rates[MOCK], f"{name} / {MOCK}, through training steps", GOAL)
        numbers[f"{name}_p99_wait_seconds"] = late
        line = [name, *harness.shown(Spread.of(values)), f"{versus.spread.median:.3f}"]
        start = starts.get(name)
        table.append([*line, f"{late * 1000:.2f}", "" if start is None else f"{start:.2f}"])
        if start is not None:
            numbers[f"{name}_first_batch_seconds"] = start
            ratios.append(versus)
    for name, (alone, peak) in readers.items():
        numbers |= {
            f"{name}_alone_images_per_second": alone,
            f"{name}_peak_mib": peak,
            f"{name}_peak_over_mock_mib": peak - idle,
        }
    conclusion = "; ".join(
        f"{name}: reads {alone:.0f} images/s where nobody trains, {peak - idle:.0f} MiB more than the mock at its peak"
        for name, (alone, peak) in readers.items()
    )
    return Findings(table, ratios, numbers, facts, conclusion)


def _rate(source: BatchSource, objective: "TokenizerObjective", same: "Batch", steps: int, device: Any) -> float:
    """Pictures per second through that many steps."""
    from pipeline.training.loop import take_step
    from pipeline.training.order import read_ahead

    start, asked = source.next_step, time.perf_counter()
    began = asked
    batches = read_ahead(source.batches.load, start, start + steps) if source.batches else itertools.repeat(same, steps)
    for number, batch in enumerate(batches):
        if number:
            source.waits.append(time.perf_counter() - asked)
        take_step(objective, batch)
        asked = time.perf_counter()
    source.next_step += steps
    return steps * len(same.indices) / (harness.now(device) - began)


def _first_batch_seconds(config: Config, memory_bytes: int) -> float:
    """From opening the shards to the first batch."""
    from pipeline.training.order import read_ahead

    started = time.perf_counter()
    next(read_ahead(harness.training_batches(config, memory_bytes).load, 0, 1))
    return time.perf_counter() - started


def read_epoch(config: Config, memory_bytes: int | None) -> float:
    """Pictures per second of a reader whose batches nobody waits for, over two epochs; runs in a process of its own.

    Without `memory_bytes` only the first batch is read, which is all that the mock needs.
    """
    from pipeline.training.order import read_ahead

    batches = harness.training_batches(config, MEMORY_BYTES if memory_bytes is None else memory_bytes)
    if memory_bytes is None:
        batches.load(0)
        return 0.0
    steps = -(-2 * len(batches.pictures) // config.train.global_batch_size)
    started = time.perf_counter()
    for _ in read_ahead(batches.load, 0, steps):
        pass
    return steps * config.train.global_batch_size / (time.perf_counter() - started)


def _objective(config: Config, folder: Path, device: Any) -> "TokenizerObjective":
    from pipeline.training.tokenizer_training import TokenizerObjective, starting_state
    from tatok_model.losses import ReconstructionLoss

    state = starting_state(config, folder / "checkpoints", device)
    losses = ReconstructionLoss(config.losses).to(device)
    return TokenizerObjective(state, losses, device, uses_bf16(config.train.precision, device))
