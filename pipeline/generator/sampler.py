"""One worker's way from numbers of samples to a shard of pictures: sample, decode, write, and the tokens beside it.

Shapes: B pictures, M global tokens, T patch tokens of the longest sequence.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.cluster import uses_bf16
from pipeline.core.files import write_atomically
from pipeline.data.shards import Shard, ShardWriter
from pipeline.generator.generated_files import INTEGERS, SCHEMA
from pipeline.tokens.decoder import decoded_pictures, shard_rows
from pipeline.tokens.parts import Made, Stopwatch
from pipeline.tokens.ranges import Range
from pipeline.tokens.stream import to_parquet
from tatok_model.config import SamplingConfig
from tatok_model.generation.sampling import sample
from tatok_model.generation.sequences import Sequences

TOKENS = "tokens"  # the folder of token files


@dataclass(frozen=True)
class SamplingWork:
    """What the tasks of one run have in common."""

    folder: Path  # of the run, on a file system that all workers share
    key: str  # of the plan
    labels: tuple[int, ...]  # sample i is asked to be of class labels[i % len(labels)]; -1: of none
    classes: tuple[str, ...]  # name of each class
    seed: int
    sampling: SamplingConfig
    batch_size: int
    encoding: str  # png | jpeg | webp
    quality: int  # of jpeg and webp
    files: ClassVar[str] = "shards"  # the folder of what is made

    def worker(self, models: Any, device: str) -> "Sampler":
        """Warmed up; models are the generator and the tokenizer."""
        generator, tokenizer = models
        sampler = Sampler(generator, tokenizer, self, device)
        sampler.warm_up()
        return sampler


class Sampler:
    """Makes shards of pictures that nobody took.

    Args:
        generator: `Generator`; it is moved to `device` and put into evaluation mode.
        tokenizer: `TaTok`, whose tokens the generator writes; the same happens to it.
        work: of the run.
        device: where everything computes.
    """

    def __init__(self, generator: Any, tokenizer: Any, work: SamplingWork, device: str) -> None:
        self._work, self._device = work, torch.device(device)
        self._generator = generator.to(self._device).eval()
        self._tokenizer = tokenizer.to(self._device).eval()

    def warm_up(self) -> None:
        """A batch of which nothing is kept: a whole one where the device has set-up to do for it, else one picture."""
        numbers = np.arange(1 if self._device.type == "cpu" else self._work.batch_size)
        self._batch(numbers, Stopwatch(self._device))

    def make(self, task: Range) -> Made:
        """Pictures and tokens of the samples of one range; see `actors.Worker`."""
        watch, tables, seconds = Stopwatch(self._device), [], []
        with watch.timed("total"):
            with ShardWriter(self._work.folder, f"{self._work.files}/{task.name}.parquet") as writer:
                for numbers in self._batches(task):
                    started = time.perf_counter()
                    sequences, pictures = self._batch(numbers, watch)
                    if len(numbers) == self._work.batch_size:  # shorter ones would look fast
                        seconds.append(time.perf_counter() - started)
                    tables.append(token_table(sequences, numbers, self._labels(numbers)))
                    for row in self._rows(numbers, pictures):
                        writer.add(row)
            data = to_parquet(pa.concat_tables(tables))
            path = self._work.folder / TOKENS / f"part-{task.index:05d}.parquet"
            write_atomically(path, data)
        if writer.shard is None:
            raise RuntimeError(f"range {task.number} has no samples; expected {task.stop - task.start}")
        beside = Shard(f"{TOKENS}/{path.name}", writer.shard.rows, hashlib.sha256(data).hexdigest())
        return Made(writer.shard, watch.seconds, beside, tuple(seconds))

    def _batches(self, task: Range) -> Iterator[np.ndarray]:
        for first in range(task.start, task.stop, self._work.batch_size):
            yield np.arange(first, min(first + self._work.batch_size, task.stop))

    def _labels(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64 classes that are asked for."""
        return np.array(self._work.labels, dtype=np.int64)[numbers % len(self._work.labels)]

    @torch.inference_mode()
    def _batch(self, numbers: np.ndarray, watch: Stopwatch) -> tuple[Sequences, np.ndarray]:
        """Sequences, on the CPU, and (B, H, W, 3) uint8 pictures of (B,) samples."""
        labels, keys = (torch.from_numpy(values).to(self._device) for values in (self._labels(numbers), numbers))
        config = self._tokenizer.config
        with torch.autocast(self._device.type, torch.bfloat16, enabled=uses_bf16("auto", self._device)):
            with watch.timed("sample"):
                sequences = sample(self._generator, labels, keys, self._work.seed, self._work.sampling)
            with watch.timed("decode"):
                tokens = sequences.to_tokens(config.patch_positions, config.global_tokens)
                pictures = decoded_pictures(self._tokenizer, tokens)
        return sequences.to("cpu"), pictures

    def _rows(self, numbers: np.ndarray, pictures: np.ndarray) -> Iterator[dict[str, Any]]:
        work, names = self._work, [f"sample-{number:08d}" for number in numbers.tolist()]
        return shard_rows(names, self._labels(numbers), pictures, work.classes, work.encoding, work.quality)


def token_table(sequences: Sequences, numbers: np.ndarray, labels: np.ndarray) -> pa.Table:
    """Rows of `generated.SCHEMA`.

    Args:
        sequences: B of them, on the CPU.
        numbers: (B,) of the samples.
        labels: (B,) classes that were asked for.
    """
    batch, width = sequences.global_indices.shape
    real, counts = sequences.real, sequences.counts.numpy()
    columns = {
        "number": pa.array(numbers, pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "global_indices": _lists(sequences.global_indices.numpy().ravel(), np.full(batch, width)),
        "codes": _lists(sequences.codes[real].numpy(), counts),
        "places": _lists(sequences.places[real].numpy(), counts),
    }
    return pa.table(columns, SCHEMA)


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.Array:
    """Numbers, one row after the other, as lists of those lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)), type=INTEGERS)
