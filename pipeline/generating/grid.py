"""Generated pictures as rows: a class in each where there are several, else a square.

Shapes: B pictures, H and W pixels.
"""

import math

import numpy as np

WHITE = 255


def class_rows(pictures: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Rows for `grids.save_rows`.

    Classes that have at least two pictures each get a row of their own, as long as the class with the fewest has
    pictures. Otherwise the pictures fill a square, sorted by class, and white ones complete its last row.

    Args:
        pictures: (B, H, W, 3) uint8, at least one.
        labels: (B,) integers, -1 for no class.
    """
    order = np.argsort(labels, kind="stable")
    found, counts = np.unique(labels, return_counts=True)
    if len(found) > 1 and counts.min() > 1:
        return [pictures[order[labels[order] == label][: counts.min()]] for label in found]
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    canvas = np.full((rows * columns, *pictures.shape[1:]), WHITE, dtype=np.uint8)
    canvas[: len(pictures)] = pictures[order]
    return list(canvas.reshape(rows, columns, *pictures.shape[1:]))
