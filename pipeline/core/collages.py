"""Pictures for people: originals beside what became of them, and the patches that were kept.

Without matplotlib, which costs a training tens of megabytes.

Shapes: B images, N patch positions, H and W pixels.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.core.files import write_atomically

INK, PALE = "#333333", "#DDDDDD"
ROW_GAP, MIN_SIDE = 2, 96  # of rows of pictures: pixels between them; smaller ones are enlarged without smoothing
PICTURE = 128  # pixels a side at least; smaller pictures are enlarged without smoothing
GAP, MARGIN, LINE = 10, 16, 22  # pixels between pictures, around them, of a line of text
LABEL = 190  # pixels, the column that names the rows


def save_rows(path: Path, rows: list[np.ndarray]) -> None:
    """Save rows of pictures below one another as PNG: originals first, reconstructions under them, for instance.

    Args:
        path: of the picture; written aside and renamed.
        rows: each (B, H, W, 3) uint8, equally many and large.
    """
    count, height, width, _ = rows[0].shape
    scale = max(1, -(-MIN_SIDE // height))
    high, wide = height * scale + ROW_GAP, width * scale + ROW_GAP
    canvas = np.full((len(rows) * high - ROW_GAP, count * wide - ROW_GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            place = np.s_[i * high : i * high + height * scale, j * wide : j * wide + width * scale]
            canvas[place] = _enlarged(picture, scale)
    _save_picture(Image.fromarray(canvas), path)


@dataclass(frozen=True)
class KeptRow:
    """What one threshold kept of each picture, and what became of it.

    Attributes:
        label: of the threshold; lines are separated by line breaks.
        kept_mask: (B, N) bool, True where the patch token is kept, in raster order.
        counts: (B,) tokens of each picture.
        reconstructions: (B, H, W, 3) uint8.
    """

    label: str
    kept_mask: np.ndarray
    counts: np.ndarray
    reconstructions: np.ndarray


def kept_patches_picture(path: Path, originals: np.ndarray, rows: Sequence[KeptRow]) -> None:
    """Originals on top; for each threshold the patches kept, dropped ones greyed, and the reconstructions, as PNG.

    Args:
        path: of the picture; written aside and renamed.
        originals: (B, H, W, 3) uint8, at least one.
        rows: one for each threshold, at least one; N is a square number that tiles the pictures.
    """
    side = PICTURE // originals.shape[1] or 1
    large = [_enlarged(picture, side) for picture in originals]
    height, width = large[0].shape[:2]
    line_high = height + GAP
    block = LINE + 2 * line_high + GAP
    size = (
        2 * MARGIN + LABEL + len(originals) * (width + GAP) - GAP,
        2 * MARGIN + line_high + len(rows) * (block + GAP) - 2 * GAP,
    )
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    _label(pen, (MARGIN, MARGIN + height // 2), "original")
    _paste(canvas, large, MARGIN)
    top = MARGIN + line_high + GAP
    for row in rows:
        grid = math.isqrt(row.kept_mask.shape[1])
        kept = [_dimmed(picture, mask.reshape(grid, grid)) for picture, mask in zip(large, row.kept_mask, strict=True)]
        pen.line([(MARGIN, top - GAP // 2), (size[0] - MARGIN, top - GAP // 2)], fill=PALE)
        for number, count in enumerate(row.counts):
            middle = MARGIN + LABEL + number * (width + GAP) + width // 2
            pen.text((middle, top + LINE // 2), f"{int(count)} tokens", INK, _font(14), anchor="mm")
        _label(
            pen, (MARGIN, top + LINE + height // 2), f"{row.label}\nmean {np.mean(row.counts):.1f} tokens\npatches kept"
        )
        _paste(canvas, kept, top + LINE)
        _label(pen, (MARGIN, top + LINE + line_high + height // 2), "reconstruction")
        _paste(canvas, [_enlarged(picture, side) for picture in row.reconstructions], top + LINE + line_high)
        top += block + GAP
    _save_picture(canvas, path)


def _save_picture(picture: Image.Image, path: Path) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def _enlarged(picture: np.ndarray, times: int) -> np.ndarray:
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _dimmed(picture: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Dropped patches in middle grey with thin lines, which black, white and grey ones that are kept do not have."""
    tall, wide = picture.shape[0] // kept.shape[0], picture.shape[1] // kept.shape[1]
    mask = kept.repeat(tall, axis=0).repeat(wide, axis=1)
    grey = 110 + 0.25 * (picture.astype(np.float64) @ (0.299, 0.587, 0.114))
    rows, columns = np.arange(picture.shape[0]) % tall == 0, np.arange(picture.shape[1]) % wide == 0
    grey[rows[:, None] | columns[None, :]] += 35
    return np.where(mask[..., None], picture, grey[..., None].round()).astype(np.uint8)


def _paste(canvas: Image.Image, pictures: Sequence[np.ndarray], top: int) -> None:
    for number, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture), (MARGIN + LABEL + number * (picture.shape[1] + GAP), top))


def _label(pen: ImageDraw.ImageDraw, middle_left: tuple[int, int], text: str) -> None:
    pen.multiline_text(middle_left, text, INK, _font(15), anchor="lm", spacing=6)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # comes with Pillow
