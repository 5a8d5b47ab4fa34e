"""One worker's way from a token file to a shard of pictures: read, cut, decode, write."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from pipeline.core.config import FilterConfig
from pipeline.core.errors import BadInput
from pipeline.data.pictures import encode
from pipeline.data.shards import Shard, ShardWriter
from pipeline.tokens.parts import Seconds, Stopwatch
from pipeline.tokens.ranges import Range
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import TokenManifest
from tatok_model.metrics.images import to_uint8
from tatok_model.tokens import Tokens


@dataclass(frozen=True)
class DecodingWork:
    """What the tasks of one run have in common."""

    folder: Path  # of the run, on a file system that all workers share
    key: str  # of the plan
    tokens: str  # folder of the tokens, which every node has to see
    manifest: TokenManifest
    filter: FilterConfig
    batch_size: int
    encoding: str  # png | jpeg | webp
    quality: int  # of jpeg and webp
    files: ClassVar[str] = "shards"  # the folder of what is made

    def worker(self, models: Any, device: str) -> "Decoder":
        """Warmed up; the model is the tokenizer."""
        decoder = Decoder(models, self, device)
        decoder.warm_up()
        return decoder


class Decoder:
    """Makes shards of pictures.

    Args:
        tokenizer: `TaTok`; it is moved to `device` and put into evaluation mode.
        work: of the run.
        device: where everything computes.
    """

    def __init__(self, tokenizer: Any, work: DecodingWork, device: str) -> None:
        self._work, self._device = work, torch.device(device)
        self._tokenizer = tokenizer.to(self._device).eval()

    def warm_up(self) -> None:
        """One whole batch of which nothing is kept, the most that decoding has to do."""
        stream, batch = self._work.manifest.stream, self._work.batch_size
        indices = torch.zeros(batch, stream.global_tokens, dtype=torch.int64)
        patches = torch.zeros(batch, stream.patch_positions, dtype=torch.int64)
        self.pictures(Tokens(indices, patches, torch.zeros_like(patches, dtype=torch.bool)))

    def make(self, task: Range) -> tuple[Shard, Seconds]:
        """Pictures of the rows of one range; see `actors.Worker`."""
        watch = Stopwatch(self._device)
        with watch.timed("total"), ShardWriter(self._work.folder, f"{self._work.files}/{task.name}.parquet") as writer:
            for row in self._rows(task, watch):
                writer.add(row)
        if writer.shard is None:
            raise RuntimeError(f"range {task.number} has no rows; expected {task.stop - task.start}")
        return writer.shard, watch.seconds

    @torch.inference_mode()
    def pictures(self, tokens: Tokens) -> np.ndarray:
        """(B, H, W, 3) uint8 of what is kept."""
        return decoded_pictures(self._tokenizer, tokens.to(self._device))

    def _rows(self, task: Range, watch: Stopwatch) -> Iterator[dict[str, Any]]:
        work, classes = self._work, self._work.manifest.classes
        file = work.manifest.splits[task.split].files[task.index]
        table = read_token_file(work.tokens, file, work.manifest.stream).take(task.rows() - file.first_row)
        tokens, ids, labels = from_table(table)
        tokens = cut(tokens, work.filter)
        for first in range(0, len(ids), work.batch_size):
            part = slice(first, first + work.batch_size)
            with watch.timed("decode"):
                pictures = self.pictures(tokens[part])
            yield from shard_rows(ids[part], labels[part], pictures, classes, work.encoding, work.quality)


def decoded_pictures(tokenizer: Any, tokens: Tokens) -> np.ndarray:
    """(B, H, W, 3) uint8 of tokens on the tokenizer's device."""
    decoded: torch.Tensor = tokenizer.decode(tokens)
    return to_uint8(decoded).permute(0, 2, 3, 1).cpu().numpy()


def shard_rows(
    ids: Sequence[str],
    labels: np.ndarray,
    pictures: np.ndarray,
    classes: Sequence[str],
    encoding: str,
    quality: int,
) -> Iterator[dict[str, Any]]:
    """Rows of a shard.

    Args:
        ids: B of them.
        labels: (B,) class indices, -1 for none.
        pictures: (B, H, W, 3) uint8.
        classes: name of each class.
        encoding: png, jpeg or webp.
        quality: of jpeg and webp.
    """
    for name, label, picture in zip(ids, labels.tolist(), pictures, strict=True):
        yield {
            "id": name,
            "image": encode(Image.fromarray(picture), encoding, quality),
            "height": picture.shape[0],
            "width": picture.shape[1],
            "label": label,
            "label_name": classes[label] if label >= 0 else "",
        }


def cut(tokens: Tokens, config: FilterConfig) -> Tokens:
    """What the configured rule keeps; of tokens that are only global, `count` keeps that many leading ones.

    Raises:
        BadInput: as `Tokens.cut` and `Tokens.cut_globals`.
    """
    try:
        if tokens.ranking is None:
            return tokens.cut_globals(int(config.threshold)) if config.rule == "count" else tokens
        return tokens.cut(config.rule, config.threshold, config.replay)
    except ValueError as error:
        raise BadInput(f"filter.threshold: {error}") from None


# How long the token sequences of a stored stream are at the configured cut; reads no picture and asks no model.


@dataclass(frozen=True)
class Lengths:
    """Of B images."""

    counts: np.ndarray  # (B,) int64, tokens of each image: M + T
    bits_fixed: np.ndarray  # (B,) float64

    def results(self) -> dict[str, float]:
        """By their names in summary.json."""
        low, middle, high = np.percentile(self.counts, (5, 50, 95)).tolist()
        return {
            "tokens_per_image": float(self.counts.mean()),
            "tokens_std": float(self.counts.std()),
            "tokens_p05": low,
            "tokens_p50": middle,
            "tokens_p95": high,
            "bits_fixed": float(self.bits_fixed.mean()),
        }


def measure_lengths(folder: str | Path, manifest: TokenManifest, ranges: list[Range], config: FilterConfig) -> Lengths:
    """Lengths of the rows of some ranges.

    Args:
        folder: of the stream, a path or URL.
        manifest: of the stream.
        ranges: of its files, at least one.
        config: how rankings are cut.

    Raises:
        BadInput: a file that is missing, changed or foreign; see `read_token_file` and `from_table`.
    """
    bits_per_token = math.log2(manifest.stream.codebook_size)
    counts, bits = [], []
    for task in ranges:
        file = manifest.splits[task.split].files[task.index]
        table = read_token_file(str(folder), file, manifest.stream).take(task.rows() - file.first_row)
        tokens = cut(from_table(table)[0], config)
        counts.append(tokens.counts().numpy())
        bits.append(tokens.bits(bits_per_token).numpy())
    return Lengths(np.concatenate(counts), np.concatenate(bits))
