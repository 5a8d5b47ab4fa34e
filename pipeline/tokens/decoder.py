"""Stored tokens at a cut: how long they are, and one worker's way from them to a shard of pictures."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from pipeline.core.config import Config, FilterConfig
from pipeline.core.console import say
from pipeline.core.errors import BadInput
from pipeline.core.ranges import Part, Stopwatch
from pipeline.core.run import Run
from pipeline.data.pictures import encode
from pipeline.data.shards import ShardWriter
from pipeline.tokens.stream import from_table, read_token_file
from pipeline.tokens.token_manifest import RowRange, TokenManifest
from pipeline.tracking import Tracker
from tatok_model.filtering_rules import fixes_length
from tatok_model.metrics.images import to_uint8
from tatok_model.tokens import Tokens
from tatok_model.vit import one_thread


@dataclass(frozen=True)
class DecodingWork:
    """How the rows of a token file become a shard of pictures; see `ranges.Work`."""

    folder: Path
    key: str
    tokens: str  # folder of the tokens, which every node has to see
    manifest: TokenManifest
    filter: FilterConfig
    batch_size: int
    encoding: str  # png | jpeg | webp
    quality: int  # of jpeg and webp
    folders: ClassVar[tuple[str, ...]] = ("shards",)

    def worker(self, tokenizer: Any, device: str) -> Callable[[RowRange], Part]:
        """The model is the tokenizer."""
        return DecodingWorker(tokenizer, self, device).make


class DecodingWorker:
    """Makes shards of pictures with a `TaTok`.

    Warmed up by one whole batch of which nothing is kept: the most that decoding has to do.
    """

    def __init__(self, tokenizer: Any, work: DecodingWork, device: str) -> None:
        self._work, self._device = work, device
        self._tokenizer = tokenizer.to(device).eval()
        stream, batch = work.manifest.stream, work.batch_size
        indices = torch.zeros(batch, stream.global_tokens, dtype=torch.int64)
        patches = torch.zeros(batch, stream.patch_positions, dtype=torch.int64)
        self.pictures(Tokens(indices, patches, torch.zeros_like(patches, dtype=torch.bool)))

    @one_thread()
    def make(self, task: RowRange) -> Part:
        """Pictures of the rows of one range."""
        watch = Stopwatch(self._device)
        with watch.timed("total"):
            file = ShardWriter.write(self._work.folder, f"shards/{task.name}.parquet", self._rows(task, watch))
        return Part(self._work.key, task.number, {"file": file}, seconds=watch.seconds)

    @torch.inference_mode()
    def pictures(self, tokens: Tokens) -> np.ndarray:
        """(B, H, W, 3) uint8 of what is kept."""
        return decoded_pictures(self._tokenizer, tokens.to(self._device))

    def _rows(self, task: RowRange, watch: Stopwatch) -> Iterator[dict[str, Any]]:
        work, classes = self._work, self._work.manifest.classes
        tokens, ids, labels = _read_cut(work.tokens, work.manifest, task, work.filter)
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


def _read_cut(
    folder: str | Path, manifest: TokenManifest, task: RowRange, config: FilterConfig
) -> tuple[Tokens, list[str], np.ndarray]:
    """Tokens at the configured cut, ids and labels of the rows of one range."""
    file = manifest.splits[task.split].files[task.index]
    table = read_token_file(str(folder), file, manifest.stream).take(task.places() - file.first_row)
    tokens, ids, labels = from_table(table)
    return cut(tokens, config), ids, labels


def length_statistics(counts: np.ndarray) -> dict[str, float]:
    """Of (B,) tokens of each image."""
    low, middle, high = np.percentile(counts, (5, 50, 95)).tolist()
    return {"mean": float(counts.mean()), "std": float(counts.std()), "p05": low, "p50": middle, "p95": high}


def length_results(statistics: dict[str, float]) -> dict[str, float]:
    """`length_statistics` by their names in summary.json."""
    return {f"tokens_{'per_image' if name == 'mean' else name}": value for name, value in statistics.items()}


NO_LIMITS = np.zeros((0, 2))  # of no picture
FEW = 0.01  # share of the patch tokens, over pictures, that a cut which does something keeps and drops at least


def cut_warning(config: Config, threshold: float, kept: np.ndarray, limits: np.ndarray) -> str:
    """What to say of a threshold that keeps nothing or everything: it was chosen for another model; else ''.

    Args:
        config: the rule, the tokenizer and, for the command that calibrates, the pictures.
        threshold: of the rule.
        kept: (B,) patch tokens of each picture.
        limits: (B, 2) of `Ranking.limits`, of the same pictures; none where they were not ranked.
    """
    section, tokenizer = config.filter, config.tokenizer
    share = float(kept.mean()) / tokenizer.patch_positions if len(kept) else 0.5
    if not len(limits) or fixes_length(section.rule, threshold) or FEW < share < 1 - FEW:
        return ""
    ends = sorted(zip(np.median(limits, axis=0).tolist(), ("keeps all", "keeps none"), strict=True))
    (low, at_low), (high, at_high) = ends
    between = f"{low:.3g}, where the median picture {at_low}, and {high:.3g}, where it {at_high}"
    pictures = "data.shards" if config.data.shards else "data.source"
    named = [f"{key}={config.value(key)}" for key in (pictures, "tokenizer.checkpoint")]
    given = " ".join(text for text in named if not text.endswith("="))
    wanted = tokenizer.global_tokens + tokenizer.patch_positions // 4
    return (
        f"filter.threshold {threshold:g} (rule {section.rule}, score {section.score}) keeps {share:.1%} of the patch "
        f"tokens of {len(kept)} pictures; expected one between {between}: "
        f"python jobs/calibrate.py {config.preset} {given} "
        f"filter.score={section.score} "
        f"filter.rounds={section.rounds} filter.rule={section.rule} filter.mean_tokens={wanted}"
    )


def measure_lengths(
    folder: str | Path, manifest: TokenManifest, ranges: list[RowRange], config: Config
) -> tuple[np.ndarray, dict[str, float]]:
    """How long the rows of some ranges of a stored stream are at the configured cut; asks no model.

    A cut that keeps nothing or everything is warned of.

    Returns:
        (B,) int64 tokens of each image, M + T, and what they say by their names in summary.json.

    Raises:
        BadInput: a file that is missing, changed or foreign; see `read_token_file` and `from_table`.
    """
    bits_per_token = math.log2(manifest.stream.codebook_size)
    counts_of_ranges, bits_of_ranges, kept, limits = [], [], [], [NO_LIMITS]
    for task in ranges:
        tokens, _, _ = _read_cut(folder, manifest, task, config.filter)
        counts_of_ranges.append(tokens.counts().numpy())
        bits_of_ranges.append(tokens.bits(bits_per_token).numpy())
        kept.append(tokens.patch_counts.numpy())
        if tokens.ranking is not None:
            limits.append(tokens.ranking.limits(config.filter.rule).numpy())
    if told := cut_warning(config, config.filter.threshold, np.concatenate(kept), np.concatenate(limits)):
        say(f"warning: {told}")
    counts, bits = np.concatenate(counts_of_ranges), np.concatenate(bits_of_ranges)
    return counts, {**length_results(length_statistics(counts)), "bits_fixed": float(bits.mean())}


def draw_lengths(run: Run, counts: np.ndarray, tracker: Tracker, title: str = "") -> None:
    """The histogram of (B,) tokens of each image, as an output of the run; titled by the configured cut."""
    from pipeline.core.plots import token_histogram

    section = run.config.filter
    cut = f": {section.score}, {section.rule} {section.threshold:g}" if run.config.tokenizer.patch_tokens else ""
    path = run.folder / "pictures" / "token_histogram.png"
    token_histogram(path, counts, title or f"Tokens per image{cut}")
    run.outputs["token_histogram"] = str(path)
    tracker.picture(path, "token_histogram", 0)
