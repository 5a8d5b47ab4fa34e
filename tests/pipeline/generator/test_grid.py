"""Rows of generated pictures."""

import numpy as np

from pipeline.generator.generate import class_rows


def pictures(count: int) -> np.ndarray:
    """(count, 1, 1, 3), each grey as its number."""
    return np.arange(count, dtype=np.uint8).repeat(3).reshape(count, 1, 1, 3)


def greys(rows: list[np.ndarray]) -> list[list[int]]:
    return [row[:, 0, 0, 0].tolist() for row in rows]


def test_classes_have_rows_of_their_own() -> None:
    assert greys(class_rows(pictures(7), np.array([0, 1, 2, 0, 1, 2, 0]))) == [[0, 3], [1, 4], [2, 5]]


def test_many_classes_fill_a_square_by_class() -> None:
    assert greys(class_rows(pictures(5), np.array([4, 3, 2, 1, 0]))) == [[4, 3, 2], [1, 0, 255]]


def test_pictures_without_a_class_fill_a_square() -> None:
    assert greys(class_rows(pictures(4), np.full(4, -1))) == [[0, 1], [2, 3]]
    assert greys(class_rows(pictures(1), np.array([0]))) == [[0]]
