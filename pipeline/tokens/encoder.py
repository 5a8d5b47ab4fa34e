"""One worker's way from pictures to a token file: read, look at every view, encode, rank, write."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.config import TokensConfig
from pipeline.core.files import write_atomically
from pipeline.data.shards import Shard, ShardDataset
from pipeline.tokens.parts import Seconds, Stopwatch
from pipeline.tokens.ranges import Range, View, look, views_of
from pipeline.tokens.stream import to_parquet, to_table
from pipeline.tokens.token_manifest import Stream
from tatok_model.tokens import Tokens


@dataclass(frozen=True)
class EncodingWork:
    """What the tasks of one run have in common."""

    folder: Path  # of the run, on a file system that all workers share
    key: str  # of the plan
    shards: str  # folder of the shards, which every node has to see
    stream: Stream
    config: TokensConfig
    seed: int  # of shifted copies
    files: ClassVar[str] = "tokens"  # the folder of what is made

    def worker(self, tokenizer: Any, device: str) -> "Encoder":
        """Warmed up."""
        encoder = Encoder(tokenizer, self, device)
        encoder.warm_up()
        return encoder


class Encoder:
    """Makes token files.

    Args:
        tokenizer: `TaTok`; it is moved to `device` and put into evaluation mode.
        work: of the run.
        device: where everything computes.
    """

    def __init__(self, tokenizer: Any, work: EncodingWork, device: str) -> None:
        self._work, self._device = work, torch.device(device)
        self._tokenizer = tokenizer.to(self._device).eval()
        self._pictures: dict[str, ShardDataset] = {}

    def warm_up(self) -> None:
        """One whole batch of noise, so that the first timed batch pays for no set-up."""
        side = self._work.stream.image_size
        noise = np.random.default_rng(0).integers(0, 256, (self._work.config.batch_size, side, side, 3), dtype=np.uint8)
        self.tokens(noise, Stopwatch(self._device))

    def make(self, task: Range) -> tuple[Shard, Seconds]:
        """Tokens of the pictures of one range; see `actors.Worker`."""
        watch = Stopwatch(self._device)
        with watch.timed("total"):
            tables = list(self._tables(task, watch))
            data = to_parquet(pa.concat_tables(tables))
            path = self._work.folder / self._work.files / f"{task.name}.parquet"
            write_atomically(path, data)
        file = Shard(f"{self._work.files}/{path.name}", task.stop - task.start, hashlib.sha256(data).hexdigest())
        return file, watch.seconds

    @torch.inference_mode()
    def tokens(self, pictures: np.ndarray, watch: Stopwatch) -> Tokens:
        """The ranked tokens of (B, H, W, 3) uint8 pictures, on the CPU."""
        stream = self._work.stream
        images = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).to(self._device)
        with watch.timed("encode"):
            tokens: Tokens = self._tokenizer.encode(images)
        with watch.timed("rank"):
            if stream.score:
                tokens = self._tokenizer.rank(tokens, stream.score, stream.rounds, images)
        return tokens.to("cpu")

    def _tables(self, task: Range, watch: Stopwatch) -> Iterator[pa.Table]:
        if task.split not in self._pictures:
            self._pictures[task.split] = ShardDataset(self._work.shards, task.split)
        source, numbers = self._pictures[task.split], task.pictures()
        batch = self._work.config.batch_size
        for first in range(0, len(numbers), batch):
            yield self._table(source, numbers[first : first + batch], views_of(task.split, self._work.config), watch)

    def _table(self, source: ShardDataset, numbers: np.ndarray, views: list[View], watch: Stopwatch) -> pa.Table:
        """Rows of (B,) pictures, the views of each one after the other; every view is one batch."""
        places = numbers.tolist()
        pictures, ids, labels = source.images(places), source.ids(places), source.labels(places)
        tables = []
        for view in views:
            tokens = self.tokens(look(pictures, view, self._work.seed, numbers), watch)
            tables.append(to_table(tokens, [name + view.name for name in ids], labels, self._work.stream))
        rows = np.arange(len(views) * len(places)).reshape(len(views), -1).T.ravel()
        return tables[0] if len(views) == 1 else pa.concat_tables(tables).take(rows)
