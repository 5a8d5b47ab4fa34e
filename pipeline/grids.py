"""Pictures that people look at: originals beside what became of them."""

from pathlib import Path

import numpy as np
from PIL import Image

GAP = 2  # pixels between pictures
MIN_SIDE = 96  # pixels; smaller pictures are enlarged without smoothing, so that every pixel can be seen


def save_rows(path: Path, rows: list[np.ndarray]) -> None:
    """Save rows of pictures below one another as PNG: originals first, reconstructions under them, for instance.

    Args:
        path: of the picture; written aside and renamed.
        rows: each (B, H, W, 3) uint8, equally many and large.

    Raises:
        ValueError: there is no row, or rows differ in shape.
    """
    if not rows or any(row.shape != rows[0].shape or row.ndim != 4 for row in rows):
        raise ValueError(f"rows are {[row.shape for row in rows]}; expected equal (B, H, W, 3)")
    count, height, width, _ = rows[0].shape
    scale = max(1, -(-MIN_SIDE // height))
    high, wide = height * scale + GAP, width * scale + GAP
    canvas = np.full((len(rows) * high - GAP, count * wide - GAP, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            canvas[i * high : i * high + height * scale, j * wide : j * wide + width * scale] = enlarged
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    Image.fromarray(canvas).save(temporary, format="PNG")
    temporary.replace(path)
