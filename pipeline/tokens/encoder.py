"""One worker's way from pictures to a token file: read, look at every view, encode, rank, write."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.config import TokensConfig
from pipeline.core.ranges import Part, Stopwatch, write_shard
from pipeline.data.shards import ShardDataset
from pipeline.tokens.stream import to_parquet, to_table
from pipeline.tokens.token_manifest import RowRange, Stream, View, views_of
from pipeline.training.order import keyed_uniforms
from tatok_model.tokens import Tokens
from tatok_model.vit import one_thread

SHIFT = 8  # copies are shifted by up to 1/SHIFT of the side
DRAWS = 3  # random numbers of a copy: down, right, mirrored


@dataclass(frozen=True)
class EncodingWork:
    """How a range of pictures becomes a token file; see `ranges.Work`."""

    folder: Path
    key: str
    shards: str  # folder of the shards, which every node has to see
    stream: Stream
    config: TokensConfig
    seed: int  # of shifted copies
    folders: ClassVar[tuple[str, ...]] = ("tokens",)

    def worker(self, tokenizer: Any, device: str) -> Callable[[RowRange], Part]:
        """The model is the tokenizer."""
        return EncodingWorker(tokenizer, self, device).make


class EncodingWorker:
    """Makes token files with a `TaTok`.

    Warmed up by one whole batch of noise, so that the first timed batch pays for no set-up.
    """

    def __init__(self, tokenizer: Any, work: EncodingWork, device: str) -> None:
        self._work, self._device = work, device
        self._tokenizer = tokenizer.to(device).eval()
        self._pictures: dict[str, ShardDataset] = {}
        side = work.stream.image_size
        noise = np.random.default_rng(0).integers(0, 256, (work.config.batch_size, side, side, 3), dtype=np.uint8)
        self.tokens(noise, Stopwatch(device))

    @one_thread()
    def make(self, task: RowRange) -> Part:
        """Tokens of the pictures of one range."""
        watch = Stopwatch(self._device)
        with watch.timed("total"):
            data = to_parquet(pa.concat_tables(self._tables(task, watch)))
            file = write_shard(self._work.folder, f"tokens/{task.name}.parquet", data, task.rows)
        return Part(self._work.key, task.number, {"file": file}, seconds=watch.seconds)

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

    def _tables(self, task: RowRange, watch: Stopwatch) -> Iterator[pa.Table]:
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


def look(pictures: np.ndarray, view: View, seed: int, numbers: np.ndarray) -> np.ndarray:
    """The pictures as a view has them.

    Copies are shifted by whole pixels, every distance alike, over borders that reflect, and half of them are mirrored.

    Args:
        pictures: (B, H, W, 3) uint8.
        view: of all of them.
        seed: keys the draws of copies, with the number of the picture and of the copy.
        numbers: (B,) places in the split.

    Returns:
        (B, H, W, 3) uint8.
    """
    if not view.copy:
        return pictures[:, :, ::-1] if view.mirrored else pictures
    high, wide = pictures.shape[1:3]
    far = high // SHIFT
    draws = keyed_uniforms(seed, np.full(len(numbers), view.copy), numbers, DRAWS)
    down, right = (np.floor(draws[:, axis] * (2 * far + 1)).astype(int) for axis in (0, 1))  # 0 to 2 far
    padded = np.pad(pictures, ((0, 0), (far, far), (far, far), (0, 0)), mode="reflect")
    rows = (down[:, None] + np.arange(high))[:, :, None]  # (B, H, 1)
    columns = (right[:, None] + np.arange(wide))[:, None, :]  # (B, 1, W)
    shifted = padded[np.arange(len(pictures))[:, None, None], rows, columns]
    mirrored = draws[:, 2] < 0.5
    shifted[mirrored] = shifted[mirrored, :, ::-1]
    return shifted
