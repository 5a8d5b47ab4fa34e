"""Which pictures or rows go into which file, decided before any work and kept as `plan.json`.

The cut depends on how many there are and on the batch size, never on how many workers there are: a range becomes the
same bytes whoever makes it, and a run that was killed goes on with the ranges that are missing.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.config import TokensConfig
from pipeline.core.errors import BadInput
from pipeline.core.files import write_json
from pipeline.core.manifest import check_unchanged
from pipeline.data.shards import SPLITS
from pipeline.tokens.token_manifest import TokenManifest
from pipeline.training.order import keyed_uniforms

# Views of training pictures that become rows of their own: mirror images and shifted copies.

SHIFT = 8  # copies are shifted by up to 1/SHIFT of the side
DRAWS = 3  # random numbers of a copy: down, right, mirrored


@dataclass(frozen=True)
class View:
    """One way to look at a picture."""

    name: str  # at the end of the row's id; empty: the picture itself
    mirrored: bool = False  # left for right
    copy: int = 0  # 1, 2, ...: shifted and mirrored at random, by this number; 0: neither


def views_of(split: str, config: TokensConfig) -> list[View]:
    """The views of each picture of a split, in the order of their rows; held-out pictures have one."""
    found = [View("")]
    if split == "train":
        found += [View("@flip", mirrored=True)] * config.flip
        found += [View(f"@crop{number}", copy=number) for number in range(1, config.crops + 1)]
    return found


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


RANGE_ROWS = 1024  # rows per range: seconds of work, a few megabytes of tokens


@dataclass(frozen=True)
class Range:
    """The work of one task: some of the rows that were chosen of a split, which are numbered 0 to count - 1.

    A picture is one row for each of its views; all of them are in one range.
    """

    number: int  # over both splits; names the part
    split: str  # train | heldout
    index: int  # within the split; names the file
    start: int  # number of the first row
    stop: int  # one past the last
    count: int  # rows chosen of the split
    total: int  # rows in the split
    views: int = 1  # rows of a picture that is to become tokens

    def rows(self) -> np.ndarray:
        """Places in the split of rows that exist: spread evenly over it, because shards may be sorted by class."""
        return np.arange(self.start, self.stop) * self.total // self.count

    def pictures(self) -> np.ndarray:
        """Places in the split of the pictures whose views become rows, spread likewise."""
        return np.arange(self.start // self.views, self.stop // self.views) * self.total // self.count

    @property
    def name(self) -> str:
        """Of the file, without folder and ending."""
        return f"{self.split}-{self.index:05d}"


def ranges_of_pictures(rows: dict[str, int], config: TokensConfig) -> list[Range]:
    """Ranges of about `RANGE_ROWS` rows, in whole batches of pictures.

    Args:
        rows: pictures in each split.
        config: which splits, how many of each, in which batches, with which views.

    Raises:
        BadInput: there is no picture in the splits that are wanted.
    """
    found: list[Range] = []
    for split, total, count in _chosen(rows, config):
        views = len(views_of(split, config))
        batch, rows_chosen = config.batch_size * views, count * views
        size = -(-RANGE_ROWS // batch) * batch
        for index, start in enumerate(range(0, rows_chosen, size)):
            stop = min(start + size, rows_chosen)
            found.append(Range(len(found), split, index, start, stop, rows_chosen, total * views, views))
    return found


def ranges_of_files(manifest: TokenManifest, config: TokensConfig) -> list[Range]:
    """One range for each token file that has rows among those chosen; raises as `ranges_of_pictures`."""
    found: list[Range] = []
    rows = {name: split.rows for name, split in manifest.splits.items()}
    for split, total, count in _chosen(rows, config):
        for index, file in enumerate(manifest.splits[split].files):
            first, end = file.first_row, file.first_row + file.rows
            start, stop = (-(-row * count // total) for row in (first, end))  # the inverse of `Range.rows`
            if start < stop:
                found.append(Range(len(found), split, index, start, stop, count, total))
    return found


def keep_plan(folder: Path, facts: dict[str, Any], ranges: list[Range]) -> str:
    """Write `plan.json`, or compare with the one that is there; returns a key that parts of the work carry.

    Args:
        folder: of the run.
        facts: everything that decides bytes, by configuration key.
        ranges: that follow from them.

    Raises:
        BadInput: the run was begun with other facts.
    """
    path = folder / "plan.json"
    if path.exists():
        check_unchanged(json.loads(path.read_bytes())["facts"], facts, folder)
    else:
        write_json(path, {"facts": facts, "ranges": [asdict(part) for part in ranges]})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _chosen(rows: dict[str, int], config: TokensConfig) -> list[tuple[str, int, int]]:
    """(split, pictures in it, pictures chosen) of the splits that have any."""
    wanted = SPLITS if config.split == "both" else (config.split,)
    chosen = [(name, rows[name], min(config.max_images or rows[name], rows[name])) for name in wanted if rows[name]]
    if not chosen:
        raise BadInput(f"tokens.split is {config.split!r}, which holds no picture; expected one of {', '.join(SPLITS)}")
    return chosen
