"""The work of one worker: sample tokens, decode them, write a shard of pictures and a file of the tokens.

Shapes: B pictures, M global tokens, T patch tokens of the longest sequence.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.cluster import uses_bf16
from pipeline.core.ranges import Part, Stopwatch, write_shard
from pipeline.data.shards import ShardWriter
from pipeline.generator.generated_files import SCHEMA
from pipeline.tokens.decoder import decoded_pictures, shard_rows
from pipeline.tokens.stream import lists, to_parquet
from pipeline.tokens.token_manifest import RowRange
from tatok_model.config import SamplingConfig
from tatok_model.generation.sampling import sample
from tatok_model.generation.sequences import Sequences
from tatok_model.vit import one_thread


@dataclass(frozen=True)
class SamplingWork:
    """What a worker needs to make a shard of pictures and a file of their tokens; see `ranges.Work`."""

    folder: Path
    key: str
    labels: tuple[int, ...]  # sample i has class labels[i % len(labels)]; -1: none
    classes: tuple[str, ...]  # name of each class
    seed: int
    sampling: SamplingConfig
    batch_size: int
    encoding: str  # png | jpeg | webp
    quality: int  # of jpeg and webp
    folders: ClassVar[tuple[str, ...]] = ("shards", "tokens")

    def worker(self, models: Any, device: str) -> Callable[[RowRange], Part]:
        """The function that makes a range; `models` are the generator and the tokenizer."""
        generator, tokenizer = models
        return SamplingWorker(generator, tokenizer, self, device).make


class SamplingWorker:
    """Makes shards of pictures with a `Generator` and the `TaTok` whose tokens it was trained on.

    Warms up at construction: with a whole batch on a GPU, which sets up for its size, with one picture on the CPU.
    """

    def __init__(self, generator: Any, tokenizer: Any, work: SamplingWork, device: str) -> None:
        self._work, self._device = work, device
        self._generator, self._tokenizer = generator.to(device).eval(), tokenizer.to(device).eval()
        self._batch(np.arange(1 if device == "cpu" else work.batch_size), Stopwatch(device))

    @one_thread()
    def make(self, task: RowRange) -> Part:
        """Sample, decode and write one range."""
        watch, batch_seconds = Stopwatch(self._device), []
        tables: list[pa.Table] = []

        def rows() -> Iterator[dict[str, Any]]:
            for first in range(task.start, task.stop, self._work.batch_size):
                numbers = np.arange(first, min(first + self._work.batch_size, task.stop))
                started = time.perf_counter()
                sequences, pictures = self._batch(numbers, watch)
                if len(numbers) == self._work.batch_size:  # a last, shorter batch would look fast
                    batch_seconds.append(time.perf_counter() - started)
                tables.append(token_table(sequences, numbers, self._labels(numbers)))
                yield from self._rows(numbers, pictures)

        with watch.timed("total"):
            pictures = ShardWriter.write(self._work.folder, f"shards/{task.name}.parquet", rows())
            data = to_parquet(pa.concat_tables(tables))
            tokens = write_shard(self._work.folder, f"tokens/part-{task.index:05d}.parquet", data, task.rows)
        files = {"file": pictures, "beside": tokens}
        return Part(self._work.key, task.number, files, seconds=watch.seconds, batch_seconds=tuple(batch_seconds))

    def _labels(self, numbers: np.ndarray) -> np.ndarray:
        """(B,) int64 classes of the (B,) samples."""
        return np.array(self._work.labels, dtype=np.int64)[numbers % len(self._work.labels)]

    @torch.inference_mode()
    def _batch(self, numbers: np.ndarray, watch: Stopwatch) -> tuple[Sequences, np.ndarray]:
        """Sequences, on the CPU, and (B, H, W, 3) uint8 pictures of the (B,) sample numbers."""
        labels, keys = (torch.from_numpy(values).to(self._device) for values in (self._labels(numbers), numbers))
        config = self._tokenizer.config
        bf16 = uses_bf16("auto", torch.device(self._device))
        with torch.autocast(self._device, torch.bfloat16, enabled=bf16):
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
    """Rows of `generated_files.SCHEMA`.

    Args:
        sequences: B of them, on the CPU.
        numbers: (B,) of the samples.
        labels: (B,) classes, -1 for none.
    """
    batch, width = sequences.global_indices.shape
    real, counts = sequences.real, sequences.counts.numpy()
    columns = {
        "number": pa.array(numbers, pa.int64()),
        "label": pa.array(labels, pa.int32()),
        "global_indices": lists(sequences.global_indices.numpy().ravel(), np.full(batch, width)),
        "codes": lists(sequences.codes[real].numpy(), counts),
        "places": lists(sequences.places[real].numpy(), counts),
    }
    return pa.table(columns, SCHEMA)
